"""`python -m restuning` is `restuning`."""

from restuning.cli import main

if __name__ == "__main__":
    main()
