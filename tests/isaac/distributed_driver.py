"""Started by torchrun: trains, and compares the processes' parameters and statistics after every iteration."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nfpo_isaacgym as nfpo  # noqa: E402, I001  # before PyTorch
import torch  # noqa: E402

rows, right = [], nfpo.ppo_update


def update_and_compare(policy, critic, optimizer, rollout, args, loss_fn):
    metrics = right(policy, critic, optimizer, rollout, args, loss_fn)
    vectors = nfpo.gather_processes(optimizer.param_groups[0]["params"][0].detach().clone())
    assert torch.equal(vectors[0], vectors[1])
    observations = nfpo.gather_processes(rollout.obs)
    assert not torch.equal(observations[0], observations[1])
    rows.append(1)
    return metrics


merged, merge = [], nfpo.RunningMeanStd.merge_processes


def merge_and_compare(self, before):
    raw = nfpo.gather_processes(self.state_dict())
    merge(self, before)
    states = nfpo.gather_processes(self.state_dict())
    for name in states[0]:
        assert torch.allclose(states[0][name], states[1][name], rtol=1e-12)
    # Counts add up, but for what both had before.
    assert abs(states[0]["count"] - (raw[0]["count"] + raw[1]["count"] - before["count"])) < 1e-6
    merged.append(1)


nfpo.ppo_update = update_and_compare
nfpo.RunningMeanStd.merge_processes = merge_and_compare
nfpo.train(
    nfpo.Args(
        env_id="cartpole",
        device="cpu",
        compile=False,
        normalize_obs=True,
        num_envs=8,
        num_steps=6,
        num_minibatches=2,
        update_epochs=2,
        hidden_dim=8,
        desired_kl=0.01,
        total_timesteps=3 * 2 * 48,
    )
)
assert len(rows) == 3 and len(merged) == 6  # observations and the critic's
print(f"{len(rows)} iterations agree", flush=True)
