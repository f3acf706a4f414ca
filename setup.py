"""What is installed where; all else is in pyproject.toml.

In a checkout the service's package `deployments`, its settings and the examples lie beside the library, and an editable
install leaves them there. A wheel takes them along inside the library, in `lorauter/_shipped`: these are not names for
the top of everybody's site-packages. `lorauter.defaults.SHIPPED` is that folder, or the checkout.
"""

import sys

from setuptools import find_packages, setup

SHIPPED = "lorauter._shipped"
packages, folders = find_packages(include=["lorauter*", "deployments*"]), {}
if "editable_wheel" not in sys.argv:
    packages = [SHIPPED, *(f"{SHIPPED}.{name}" if name.startswith("deployments") else name for name in packages)]
    folders = {SHIPPED: ".", f"{SHIPPED}.deployments": "deployments"}

setup(
    script_name="setup.py",  # which is no module of what is shipped
    packages=packages,
    package_dir=folders,
    include_package_data=False,  # only what pyproject.toml names, not whatever lies in a checkout
)
