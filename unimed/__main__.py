"""`python -m unimed` and the `unimed` command: they say in one line when the packages that unimed needs are not installed."""

import sys


def main() -> None:
    try:
        from unimed.cli.app import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "unimed", "cmoe_kernels") or "--debug" in sys.argv:
            raise
        from unimed.notice import INSTALL

        print(f"error: the package {package} is not installed; get all that unimed needs with: {INSTALL}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
