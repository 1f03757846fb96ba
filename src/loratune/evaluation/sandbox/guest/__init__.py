"""What runs inside the sandbox: stdlib only, started as a package of its own named `guest`.

Two kinds of process are started from here. The answering one (answer.py) holds the generated
program and nothing else; the asking one (ask.py) holds the tests and never runs a line of the
program. Nothing here may import the rest of the package: it is not there, inside.
"""

# What both sides know of the inside: the only folder that can be written, all devices.
WORK_FOLDER = "/tmp"
USER_INSIDE = 1000  # how a user namespace calls the user who made it, root included
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
