"""Environments of the benchmarks, used as `--env-id benchmarks.envs.<module>:<id>`."""
