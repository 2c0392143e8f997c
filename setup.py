"""Builds cmoe_kernels/_C.abi3.so where torch and a C++ compiler are found (csrc/build.py); elsewhere the package is pure Python."""

import importlib.util
import os
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation nothing compares it with pyproject.toml
    sys.exit(f"setuptools is {setuptools.__version__}, at least 77 is needed: pip install --upgrade setuptools")

ROOT = Path(__file__).resolve().parent


def module(name: str, *place: str):
    """By its place: in `pip install .` the project's root is not on the path."""
    spec = importlib.util.spec_from_file_location(name, ROOT.joinpath(*place))
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


native = module("build_native", "csrc", "build.py")
MISSING = native.missing()


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = native.library()
        library.build.run()
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(library.target), target)


class BuildPython(build_py):
    def run(self) -> None:
        if MISSING:
            print(
                f"cmoe_kernels: installed WITHOUT its native library: {MISSING}. Everything works, on plain PyTorch. For the native "
                "kernels, have torch and a C++ compiler, then: pip install --no-build-isolation --force-reinstall --no-deps <this package>",
                file=sys.stderr,
            )
            # A library from an earlier build in place would be loaded all the same, whatever it was built from.
            Path("cmoe_kernels", native.LIBRARY).unlink(missing_ok=True)
        super().run()


class Information(egg_info):
    """Adds the bill of materials, in the place of PEP 770: sboms/ of the wheel's .dist-info."""

    def run(self) -> None:
        self.mkpath(os.path.join(self.egg_info, "sboms"))
        bill = module("sbom", "tools", "sbom.py").text(ROOT, self.distribution.get_version())
        Path(self.egg_info, "sboms", "unimed-sample.cdx.json").write_text(bill, encoding="utf-8")
        super().run()


setup(
    ext_modules=[] if MISSING else [Extension("cmoe_kernels._C", native.ALL_SOURCES, py_limited_api=True)],
    cmdclass={"build_ext": Build, "build_py": BuildPython, "egg_info": Information},
    options={} if MISSING else {"bdist_wheel": {"py_limited_api": native.PYTHON_TAG}},
)
