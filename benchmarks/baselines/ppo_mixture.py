"""The third contender: the NFPO script with its policy swapped for a mixture of five diagonal Gaussians.

A mixture can have several modes without any flow, so it separates what multimodality does from what the flow does.

Run:     python benchmarks/baselines/ppo_mixture.py --env-id Humanoid-v4

Leave --ent-coef at its default, 0: the script's entropy bonus differentiates through `sample`, and no gradient passes
through the choice of a component, so the component weights would get a biased one.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.baselines.ppo_continuous_action import refuse_flow_flags  # noqa: E402
from nfpo_continuous_action import Args, linear, main  # noqa: E402


class MixturePolicy(nn.Module):
    """Component weights and means from the Gaussian twin's tanh network; state-independent log standard deviations.

    pi(a|o) = sum_k w_k(o) N(a; mean_k(o), diag(std_k^2)), k = 1 .. K

    `base_std` is the standard deviation of the whole mixture at the start, in each dimension, as it is the twin's: it
    scales the distances between the means as well as the components' own deviations.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, hidden_dim: int = 64, num_components: int = 5, base_std: float = 1.0
    ):
        super().__init__()
        self.shape = num_components, action_dim
        self.trunk = nn.Sequential(linear(obs_dim, hidden_dim), nn.Tanh(), linear(hidden_dim, hidden_dim), nn.Tanh())
        self.logits = linear(hidden_dim, num_components, gain=0.01)
        self.means = linear(hidden_dim, num_components * action_dim, gain=0.01)
        # The observation's share of the means starts small, as in CleanRL. That leaves all components at nearly one
        # place, where each action's gradient is nearly the same for all of them, and they would move as one. So the
        # biases start apart: in each dimension at the midpoints of K equal parts of [-base_std, base_std], in an order
        # of its own (a Latin hypercube). Their mean is 0, and the deviations start where the mixture's variance in each
        # dimension is base_std^2: weights nearly equal, it explores at first as widely as the twin.
        midpoints = (2 * torch.arange(num_components) + 1) / num_components - 1
        biases = torch.stack([midpoints[torch.randperm(num_components)] for _ in range(action_dim)], dim=1)
        self.means.bias.data.copy_(base_std * biases.flatten())
        log_std = math.log(base_std) + 0.5 * math.log(1 - midpoints.square().mean().item())
        self.log_std = nn.Parameter(torch.full(self.shape, log_std))

    def components(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Observations (B, obs_dim) to log-weights (B, K) and means (B, K, action_dim)."""
        hidden = self.trunk(obs)
        return self.logits(hidden).log_softmax(-1), self.means(hidden).unflatten(-1, self.shape)

    def mixture_log_prob(self, log_weights: torch.Tensor, means: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log sum_k w_k N(a; mean_k, diag(std_k^2)), with actions (B, action_dim). -> (B,)."""
        z = (action.unsqueeze(-2) - means) * (-self.log_std).exp()  # (B, K, action_dim)
        log_probs = (-0.5 * (z.square() + math.log(2 * math.pi)) - self.log_std).sum(-1)
        return (log_weights + log_probs).logsumexp(-1)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """(B, obs_dim), (B, action_dim) -> (B,)."""
        return self.mixture_log_prob(*self.components(obs), action)

    def sample(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, obs_dim) -> actions (B, action_dim), log-probabilities (B,) of the mixture at temperature 1.

        A component is drawn by its weight, then its noise, whose standard deviation `temperature` multiplies. At 0 the
        action is the mean of the likeliest component. That is not quite the mode of the mixture, which has no closed
        form: components that overlap, or one that is less likely but narrower, may have their peak elsewhere.
        """
        log_weights, means = self.components(obs)
        if temperature > 0:
            # Where a uniform number falls among the cumulated weights; the last is 1 but for rounding, and left out.
            thresholds = log_weights.exp().cumsum(-1)[:, :-1]
            index = (thresholds <= torch.rand_like(thresholds[:, :1])).sum(-1)  # (B,)
        else:
            index = log_weights.argmax(-1)
        # Not `take_along_dim`, nor an index with len(obs): either ties an exported policy to one batch size.
        action = means.gather(1, index[:, None, None].expand(-1, 1, means.shape[-1])).squeeze(1)
        if temperature > 0:
            action = action + temperature * self.log_std[index].exp() * torch.randn_like(action)
        return action, self.mixture_log_prob(log_weights, means, action)


if __name__ == "__main__":
    refuse_flow_flags()
    main(MixturePolicy, Args(exp_name="ppo_mixture"))
