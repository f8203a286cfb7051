"""Stand-in for Unitree RL Gym, see ../README.md."""
