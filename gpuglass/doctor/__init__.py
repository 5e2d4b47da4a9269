"""`gpuglass doctor`: what can be observed on this machine, and what to do about the rest.

One module per group of checks, each pure over what it is given; `command` reads the machine and prints. Rooms
add checks by entry points of the group `gpuglass.diagnoses`: a function from the configuration to `Check`s.
"""

from gpuglass.doctor.check import Check, Status

__all__ = ["Check", "Status"]
