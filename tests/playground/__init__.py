"""Tests of nfpo_playground_jax.py, a package so that its conftest.py is not taken for the one above."""
