"""First uses from several threads at once find every installed backend, and never wait for ever."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint

import pytest
import torch
from dilated_core import (
    AttentionInputs,
    AttentionVariant,
    DilatedPattern,
    available_backends,
    create_dilated_attention,
    dilated_attention,
    explain_backends,
    register_backend,
    unregister_backend,
)
from dilated_core.backends import registry
from dilated_core.backends.eager import EagerBackend
from dilated_core.modules import factory

NUM_THREADS = 8
INPUTS = AttentionInputs(torch.device("cpu"), torch.float32, 2, 4)


class Installed(EagerBackend):
    """A backend of an installed package, and the first choice of "auto"."""

    priority = 100

    def __init__(self, name):
        self.name = name


class SlowEntryPoint:
    """An entry point whose package takes long to import, as PyTorch's compiler does."""

    def __init__(self, backend, during=lambda: None):
        self.name = backend.name
        self.backend, self.during = backend, during
        self.loads = 0

    def load(self):
        self.loads += 1
        time.sleep(0.05)
        self.during()
        return self.backend


@pytest.fixture
def install(monkeypatch):
    """Let a fresh registry find these entry points."""
    own = {name: registry._registered[name] for name in ("eager", "sdpa")}
    for name, value in {"_registered": own, "_broken": {}, "_entry_points_read": False}.items():
        monkeypatch.setattr(registry, name, value)
    registry.forget_choices()
    yield lambda *points: monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry.forget_choices()


def from_threads(function):
    """The results of `function` called from all threads at once."""
    barrier = threading.Barrier(NUM_THREADS)

    def call(_):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(call, range(NUM_THREADS)))


def attention():
    x = torch.ones(1, 4, 2, 4)
    return dilated_attention(x, x, x, DilatedPattern([4], [1]), backend="second").shape


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda: registry.get_backend("second").name, "second"),
        (available_backends, ("first", "second", "sdpa", "eager")),
        (lambda: registry.choose_backend("auto", INPUTS).name, "first"),
        (lambda: registry.choose_backend("second", INPUTS).name, "second"),
        (lambda: explain_backends().splitlines()[2], "  second    can run"),
        (attention, (1, 4, 2, 4)),
    ],
    ids=["get", "available", "auto", "named", "explain", "attention"],
)
def test_every_thread_finds_every_backend_and_each_loads_once(install, use, expected):
    points = [SlowEntryPoint(Installed(name)) for name in ("first", "second")]
    install(*points)
    assert from_threads(use) == [expected] * NUM_THREADS
    assert [point.loads for point in points] == [1, 1]


def test_an_import_may_register_its_backend_and_look_others_up(install):
    mine, found = Installed("mine"), []

    def during():
        register_backend(mine)
        found.append(registry.get_backend("mine"))
        found.append(registry.choose_backend("auto", INPUTS))
        found.append(available_backends())
        with pytest.raises(ValueError, match="backend is 'other'; it must be"):
            registry.get_backend("other")

    install(SlowEntryPoint(mine, during), SlowEntryPoint(Installed("other")))
    assert available_backends() == ("mine", "other", "sdpa", "eager")
    assert found == [mine, mine, ("mine", "sdpa", "eager")]
    assert "cannot be loaded" not in explain_backends()


def test_another_thread_may_register_while_packages_are_imported(install):
    """An import lock that one thread holds and the other needs must not lock both up."""

    def during():
        thread = threading.Thread(target=register_backend, args=[Installed("other")], daemon=True)
        thread.start()
        thread.join(timeout=120)
        assert not thread.is_alive()

    install(SlowEntryPoint(Installed("mine"), during))
    assert available_backends() == ("other", "mine", "sdpa", "eager")


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError, KeyError])
def test_a_package_that_fails_in_any_way_hides_no_other(install, error):
    """A compiled extension that was built for another PyTorch fails with any of these."""

    def during():
        raise error("a symbol is missing")

    install(SlowEntryPoint(Installed("first"), during), SlowEntryPoint(Installed("second")))
    assert registry.choose_backend("auto", INPUTS).name == "second"
    with pytest.raises(
        ValueError, match=rf"'first' is installed but .* {error.__name__}: .*symbol"
    ):
        registry.get_backend("first")


def test_an_interrupted_load_is_taken_up_by_the_next_call(install):
    is_interrupted = True

    def during():
        if is_interrupted:
            raise KeyboardInterrupt

    install(SlowEntryPoint(Installed("first")), SlowEntryPoint(Installed("second"), during))
    with pytest.raises(KeyboardInterrupt):
        available_backends()
    is_interrupted = False
    assert available_backends() == ("first", "second", "sdpa", "eager")
    assert "cannot be loaded" not in explain_backends()


def test_a_choice_from_before_a_change_is_not_kept_after_it(install):
    """A thread is still choosing when another one registers a backend or takes a ranking back."""
    install()

    class Better(Installed):
        priority = 200

    class Slow(Installed):
        during = staticmethod(lambda: None)

        def why_not(self, inputs):
            during, self.during = self.during, lambda: None
            during()
            return []

    slow = Slow("slow")
    register_backend(slow)
    by_time = {"eager": (300, "timed here")}
    for best, change, back in (
        (
            "better",
            lambda: register_backend(Better("better")),
            lambda: unregister_backend("better"),
        ),
        (
            "eager",
            lambda: registry.use_ranking(lambda _: by_time),
            lambda: registry.use_ranking(None),
        ),
    ):
        slow.during = change
        registry.forget_choices()
        assert registry.choose_backend("auto", INPUTS).name == "slow"
        assert registry.choose_backend("auto", INPUTS).name == best
        back()
        assert registry.choose_backend("auto", INPUTS).name == "slow"


def test_backends_come_and_go_while_others_are_chosen(install):
    install()
    stop = time.monotonic() + 0.3
    names = iter(range(NUM_THREADS))

    def use():
        name = f"backend {next(names)}"
        while time.monotonic() < stop:
            register_backend(Installed(name))
            assert name in available_backends()
            assert registry.choose_backend("auto", INPUTS).name.startswith("backend")
            assert "backend" in explain_backends()
            unregister_backend(name)
        return name

    assert len(set(from_threads(use))) == NUM_THREADS
    assert available_backends() == ("sdpa", "eager")


def test_modules_of_other_packages_are_built_from_threads(monkeypatch):
    class Package:
        @property
        def variant(self):
            time.sleep(0.05)
            return AttentionVariant(torch.nn.Identity, torch.nn.Identity)

    monkeypatch.setitem(sys.modules, "slow_package", Package())
    point = EntryPoint("ring", "slow_package:variant", "dilated.attention")
    monkeypatch.setattr(factory, "entry_points", lambda group, name: [point])
    built = from_threads(lambda: create_dilated_attention("ring"))
    assert all(isinstance(module, torch.nn.Identity) for module in built)
