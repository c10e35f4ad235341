"""Puts a library of the CPU kernels into a wheel, if `make dist` has built one for its platform.

Without these two variables the wheel has none, as for an editable install: the kernels are then
compiled on the machine that runs them.

    MIXTRAL_JAX_WHEEL_LIBRARY    path of the library
    MIXTRAL_JAX_WHEEL_PLATFORM   the platforms of the wheel's name, such as manylinux2014_x86_64
"""

import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_LIBRARY = os.environ.get("MIXTRAL_JAX_WHEEL_LIBRARY")
_PLATFORM = os.environ.get("MIXTRAL_JAX_WHEEL_PLATFORM")


class _Files(build_py):
    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib) / "mixtral_jax" / "kernels" / "cpu"
        if _LIBRARY and not self.editable_mode:
            shutil.copyfile(_LIBRARY, folder / "kernels.so")


class _Package(Distribution):
    def has_ext_modules(self) -> bool:
        # Files for one platform stand in another folder of a wheel than those for any.
        return bool(_LIBRARY) or super().has_ext_modules()


class _Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", _PLATFORM) if _LIBRARY and _PLATFORM else super().get_tag()


setup(distclass=_Package, cmdclass={"build_py": _Files, "bdist_wheel": _Wheel})
