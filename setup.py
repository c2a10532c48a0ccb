"""Everything about the package is in settings.ini, where nbdev reads it too; this hands it to setuptools."""

import configparser
import shlex
from pathlib import Path

from setuptools import find_packages, setup

parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def words(key):
    """The blank-separated words of a setting; quotes keep a word with blanks together."""
    # posix=False keeps the quotes of environment markers such as sys_platform=='linux'.
    return shlex.split(settings.get(key, ""), posix=False)


extras = {name: words(f"{name}_requirements") for name in ("dev", "docs", "export", "gpu", "track")}
extras["dev"] += extras["docs"]  # whose tests build pages

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=["affscl", "affscl.*"]),
    package_data={
        "affscl": ["py.typed"],
        "affscl.model": ["initial/*.safetensors", "initial/*.md"],
        "affscl.use": ["*.html.jinja"],
    },
    python_requires=f">={settings['min_python']}",
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    zip_safe=False,
)
