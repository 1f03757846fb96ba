"""What runs inside the sandbox: stdlib only, started as a package of its own named `guest`.

Two kinds of process are started from here. The answering one (answer.py) holds the generated
program and nothing else; the asking one (ask.py) holds the tests and never runs a line of the
program. Nothing here may import the rest of the package: it is not there, inside.
"""

# All that both sides know: the only folder that can be written, and all devices, inside.
WORK_FOLDER = "/tmp"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
