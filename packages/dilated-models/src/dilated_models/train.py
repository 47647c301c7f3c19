"""`python -m dilated_models.train` is `dilated train`: the module that torchrun starts."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dilated_models.cli import main

    sys.argv.insert(1, "train")
    main()
