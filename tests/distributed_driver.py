"""The script's own command line, after which each process writes down its agent. Started by test_distributed.py."""

import os
from pathlib import Path

import torch

import nfpo_continuous_action as nfpo


class WatchedAgent(nfpo.Agent):
    """An agent that is remembered here, and its environments."""

    made = []

    def __init__(self, args, policy_class, envs):
        super().__init__(args, policy_class, envs)
        self.made.append((self, envs))


if __name__ == "__main__":
    nfpo.Agent = WatchedAgent
    try:
        nfpo.main()
    finally:
        if WatchedAgent.made:
            agent, envs = WatchedAgent.made[-1]
            result = {"agent": agent.state_dict(), "obs": envs.obs}
            torch.save(result, Path(os.environ["AGENTS"], f"rank{os.environ['RANK']}.pt"))
