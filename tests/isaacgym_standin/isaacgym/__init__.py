"""Stand-in: like the real package, it refuses to be imported after PyTorch."""

import sys

if "torch" in sys.modules:
    raise ImportError("PyTorch was imported before isaacgym modules.  Please import torch after isaacgym modules.")
