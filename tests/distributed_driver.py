"""The script's own command line, after which each process writes down its networks. Started by test_distributed.py."""

import os
from pathlib import Path

import torch

import nfpo_continuous_action as nfpo

NETWORKS = []


class WatchedPolicy(nfpo.FlowPolicy):
    """A flow that is remembered here; as anyone's own policy, it is a class handed to `main`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        NETWORKS.append(self)


class WatchedCritic(nfpo.Critic):
    """A critic that is remembered here."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        NETWORKS.append(self)


if __name__ == "__main__":
    nfpo.Critic = WatchedCritic
    try:
        nfpo.main(WatchedPolicy)
    finally:
        weights = [network.state_dict() for network in NETWORKS]
        torch.save(weights, Path(os.environ["WEIGHTS"], f"rank{os.environ['RANK']}.pt"))
