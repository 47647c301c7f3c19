"""A pool lends memory to one borrower at a time, and reports what it really holds."""

import random
import sys
import threading
import time
from functools import partial

import pytest
import torch
from dilated_core.streaming.pool import WorkspacePool

KB = 1024


def _bytes(pool, nbytes):
    return pool.borrow((nbytes,), dtype=torch.uint8)


def test_a_returned_buffer_is_used_again_in_any_shape_and_dtype():
    pool = WorkspacePool()
    with pool.borrow((8, 128), dtype=torch.float32) as buffer:
        assert (buffer.shape, buffer.dtype) == ((8, 128), torch.float32)
        assert buffer.is_contiguous()
        address = buffer.data_ptr()
        assert (pool.idle_bytes, pool.borrowed_bytes) == (0, 4 * KB)
    assert (pool.idle_bytes, pool.borrowed_bytes) == (4 * KB, 0)
    for shape, dtype in (((4, 5, 60), torch.bfloat16), ((500,), torch.float64)):
        with pool.borrow(shape, dtype=dtype) as buffer:
            assert (buffer.shape, buffer.dtype) == (shape, dtype)
            assert buffer.data_ptr() == address
            buffer.fill_(3)
    assert (pool.hits, pool.misses) == (2, 1)


def test_two_borrowers_never_share_memory():
    pool = WorkspacePool()
    with _bytes(pool, 4 * KB):
        pass
    with _bytes(pool, 4 * KB) as a, _bytes(pool, 4 * KB) as b:
        assert abs(a.data_ptr() - b.data_ptr()) >= 4 * KB
    assert pool.misses == 2


def test_many_threads_never_share_memory(request):
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # so that threads meet within a call
    pool = WorkspacePool(max_bytes=64 * KB)
    lent, lock, failures = {}, threading.Lock(), []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(60):
            size = rng.randrange(1, 16 * KB)
            with _bytes(pool, size) as buffer:
                start = buffer.data_ptr()
                with lock:
                    if any(start < s + n and s < start + size for s, n in lent.values()):
                        failures.append("overlap")
                    lent[seed] = (start, size)
                buffer.fill_(seed)
                if rng.random() < 0.5:
                    time.sleep(0.0005)
                if not (buffer == seed).all():
                    failures.append("content")
                with lock:
                    del lent[seed]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert pool.borrowed_bytes == 0
    assert 0 < pool.idle_bytes <= 64 * KB
    assert pool.hits + pool.misses == 16 * 60
    assert pool.hits > 0


class SlowList(list):
    """Gives every other thread time to come between finding an item and removing it."""

    def pop(self, index=-1):
        item = self[index]
        time.sleep(0.02)
        self.remove(item)
        return item

    def remove(self, item):
        self[:] = [other for other in self if other is not item]


def test_threads_that_take_at_once_get_different_buffers():
    pool, addresses, all_borrowed = WorkspacePool(), [], threading.Barrier(4, timeout=30)
    with _bytes(pool, KB), _bytes(pool, KB):
        pass
    pool._idle = SlowList(pool._idle)

    def work():
        with _bytes(pool, KB) as buffer:
            addresses.append(buffer.data_ptr())
            all_borrowed.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(addresses)) == len(addresses) == 4
    assert (pool.idle_bytes, pool.borrowed_bytes) == (4 * KB, 0)


def test_nobody_waits_for_a_borrower():
    pool = WorkspacePool()
    entered, release = threading.Event(), threading.Event()

    def hold():
        with _bytes(pool, KB):
            entered.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(30)
    with _bytes(pool, KB):
        assert pool.borrowed_bytes == 2 * KB
    release.set()
    thread.join(30)
    assert pool.borrowed_bytes == 0


def test_an_exception_returns_the_buffer():
    pool = WorkspacePool()

    def fail():
        with _bytes(pool, KB):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert (pool.idle_bytes, pool.borrowed_bytes) == (KB, 0)


def test_the_smallest_buffer_that_fits_is_taken_but_none_more_than_twice_as_large():
    pool = WorkspacePool()
    with _bytes(pool, 8 * KB) as a, _bytes(pool, 3 * KB) as b, _bytes(pool, 2 * KB):
        addresses = a.data_ptr(), b.data_ptr()
    with _bytes(pool, 3 * KB - 100) as x:
        assert x.data_ptr() == addresses[1]
    with _bytes(pool, 4 * KB) as x:
        assert x.data_ptr() == addresses[0]
    assert (pool.hits, pool.misses) == (2, 3)
    with _bytes(pool, KB - 600):
        assert pool.misses == 4


def test_idle_memory_stays_within_the_limit_and_the_oldest_goes_first():
    pool = WorkspacePool(max_bytes=8 * KB)
    with _bytes(pool, 1 * KB):
        pass
    with _bytes(pool, 4 * KB):
        pass
    with _bytes(pool, 1 * KB):  # now the 4 KB are the oldest
        pass
    with _bytes(pool, 7 * KB):
        assert pool.idle_bytes == 5 * KB
    assert pool.idle_bytes == 8 * KB
    misses = pool.misses
    with _bytes(pool, 1 * KB), _bytes(pool, 7 * KB):
        assert pool.misses == misses
    with _bytes(pool, 100 * KB):  # beyond the limit by itself: it makes nothing else go
        assert pool.idle_bytes == 8 * KB
        assert pool.borrowed_bytes == 100 * KB
    assert pool.idle_bytes == 8 * KB


def test_clear_frees_what_is_idle_only():
    pool = WorkspacePool()
    with _bytes(pool, KB):
        pass
    with _bytes(pool, 4 * KB) as buffer:
        pool.clear()
        assert (pool.idle_bytes, pool.borrowed_bytes) == (0, 4 * KB)
        buffer.fill_(1)
    assert (pool.idle_bytes, pool.borrowed_bytes) == (4 * KB, 0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_any_shape_can_be_borrowed(shape):
    with WorkspacePool().borrow(shape, dtype=torch.float64) as buffer:
        assert buffer.shape == shape
        buffer.zero_()


def test_buffers_made_in_inference_mode_serve_outside_of_it():
    pool = WorkspacePool()
    with torch.inference_mode(), _bytes(pool, KB):
        pass
    with _bytes(pool, KB) as buffer:
        buffer.fill_(1)
        assert not buffer.is_inference()
    assert pool.hits == 1


def test_mistakes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"pin_memory is True and there is no CUDA device; .* leave"
    ):
        WorkspacePool(pin_memory=True)
    with pytest.raises(ValueError, match="max_bytes is -1; it must be at least 0"):
        WorkspacePool(-1)
    with pytest.raises(TypeError, match=r"max_bytes is 1\.5; it must be an integer"):
        WorkspacePool(1.5)
    with pytest.raises(ValueError, match=r"shape\[1\] is -3; it must be at least 0"):
        WorkspacePool().borrow((2, -3)).__enter__()


@pytest.mark.gpu
def test_gpu_and_page_locked_memory():
    pool = WorkspacePool()
    with pool.borrow((100,), device="cuda") as buffer:
        address = buffer.data_ptr()
    with torch.cuda.stream(torch.cuda.Stream()), pool.borrow((100,), device="cuda:0") as buffer:
        assert buffer.data_ptr() != address  # another stream may still be using it
    with pool.borrow((100,), device="cuda:0") as buffer:
        assert buffer.data_ptr() == address
    pinned = WorkspacePool(pin_memory=True)
    with pinned.borrow((100,)) as buffer:
        assert buffer.is_pinned()
    with pytest.raises(ValueError, match="device is cuda and the pool's memory is page-locked"):
        pinned.borrow((100,), device="cuda").__enter__()
