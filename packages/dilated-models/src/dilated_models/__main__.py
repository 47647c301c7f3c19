"""`python -m dilated_models` is the `dilated` command."""

from dilated_models.cli import main

main()
