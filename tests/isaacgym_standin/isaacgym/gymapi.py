"""Stand-in for the one constant that a namespace of settings needs."""

SIM_FLEX, SIM_PHYSX = 0, 1
