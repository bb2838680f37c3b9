"""``python -m loramerge``: the same as the ``loramerge`` script."""

from .cli import main

if __name__ == "__main__":
    main()
