"""`python -m unimed`: the same as the `unimed` command."""

from unimed.cli import main

if __name__ == "__main__":
    main()
