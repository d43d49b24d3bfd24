"""ReFT as a PEFT method: its configuration, the tuner, and what hangs on an edited module.

The first room that knows PEFT, which is imported before anything in here: its own import brings the tuner along
(:mod:`fastreft.joining`), which would otherwise meet a half of itself.
"""

import peft as peft
