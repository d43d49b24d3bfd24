"""A wheel's requirements, a line each, less those that are named: python requirements_of.py WHEEL NAME..."""

import email
import re
import sys
import zipfile

wheel, *without = sys.argv[1:]
with zipfile.ZipFile(wheel) as file:
    path = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
    needed = email.message_from_bytes(file.read(path)).get_all("Requires-Dist") or []
for line in needed:
    if re.split(r"[^A-Za-z0-9._-]", line)[0].lower() not in without and "extra ==" not in line:
        print(line)
