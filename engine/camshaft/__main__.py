"""``python -m camshaft`` is the command line."""

from camshaft.cli import main

if __name__ == "__main__":
    main()
