"""NFPO on Isaac Gym: PPO whose policy is a normalizing flow instead of a Gaussian, for robots.

Paper: "NFPO: Stabilized Policy Optimization of Normalizing Flow for Robotic Policy Learning" (Shi et al., 2026).

  1. A RealNVP flow f, conditioned on the observation o, maps an action a to a latent z = f(a; o) that is N(0, I).
     The change of variables gives its exact density: log pi(a|o) = log N(z; 0, I) + log|det df/da|.
  2. To act, draw z and run f backwards. PPO needs nothing else from a policy, so the rest of it stays as it is.
  3. Left alone, training inflates the determinant until numbers break. NFPO bounds each log-scale: l * tanh(s) (Eq. 6).
  4. To deploy, run f backwards from z = 0, the mode of the base distribution (Sec. A.6).

Train:     python nfpo_isaacgym.py --env-id g1
Deploy:    python nfpo_isaacgym.py --evaluate runs/RUN --export-jit policy.pt --export-onnx policy.onnx
Needs:     Python 3.8, Isaac Gym Preview 4, and Unitree RL Gym or IsaacGymEnvs
"""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):  # `make_envs` says so; without a simulator, a policy can still be exported
    import isaacgym  # noqa: F401  # it refuses to be imported after PyTorch

import argparse
import dataclasses
import importlib
import inspect
import io
import json
import math
import os
import random
import shlex
import shutil
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Literal, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typing_extensions import Annotated

BAR = {"mininterval": 0.1 if sys.stderr.isatty() else 30}  # a line every half minute in a log
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(config={"extra": "forbid", "allow_inf_nan": False})
class Args:
    env_id: str = "g1"  # task of legged_gym (Unitree's: g1, h1, h1_2, go2), `module:task`, or `isaacgymenvs:Ant`
    exp_name: str = "nfpo_isaacgym"  # name of this experiment, a part of the run's name
    seed: NonNegativeInt = 1  # seed of networks, noise, minibatches and environments
    total_timesteps: PositiveInt = 200_000_000  # environment steps to train for, over all environments and processes
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cuda:0"  # of simulator and networks, cpu or cuda:N
    headless: bool = True  # simulate without the viewer
    compile: bool = True  # compile policy and update; eager where no compiler works
    torch_threads: PositiveInt = 1  # PyTorch's threads on the CPU
    runs_dir: str = "runs"  # folder that receives one folder per run
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT and WANDB_ENTITY say where
    checkpoint_interval: PositiveInt = 50  # iterations between checkpoints; the last iteration always writes one
    keep_interval: Optional[PositiveInt] = None  # iterations between checkpoints that stay, as checkpoint-STEP.pt
    resume: Optional[str] = None  # run folder to continue; other flags override the run's own
    evaluate: Optional[str] = None  # run folder or checkpoint to play instead of training
    eval_episodes: NonNegativeInt = 100  # episodes that --evaluate plays, all at once; 0 needs no simulator
    temperature: NonNegativeFloat = 0.0  # factor on the base's deviation in --evaluate; 0 is the deterministic policy
    export_jit: Optional[str] = None  # TorchScript file that --evaluate writes the deterministic policy to
    export_onnx: Optional[str] = None  # ONNX file that --evaluate writes the deterministic policy to

    num_envs: PositiveInt = 4096  # parallel environments in each process
    random_initial_steps: bool = True  # start the first episodes at random step counts, so that not all end at once
    randomize: bool = True  # legged_gym's observation noise, random friction and pushes
    normalize_obs: bool = False  # by running statistics; Unitree's tasks scale theirs, most of IsaacGymEnvs' do not
    reward_scale: PositiveFloat = 1.0  # factor on the rewards that are trained on
    learning_rate: PositiveFloat = 1e-3  # learning rate of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    desired_kl: Optional[PositiveFloat] = None  # KL divergence that the learning rate follows; PPO-adaptive has 0.01
    num_steps: PositiveInt = 24  # steps of each environment in one rollout (T in Algorithm 1)
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalized advantage estimation
    num_minibatches: PositiveInt = 4  # minibatches per epoch (M in Algorithm 1)
    update_epochs: PositiveInt = 5  # epochs over each rollout (N in Algorithm 1)
    norm_adv: bool = True  # normalize advantages within a minibatch
    clip_coef: Annotated[float, Field(gt=0, lt=1)] = 0.2  # clip range of the ratio (epsilon in Algorithm 1)
    clip_vloss: bool = True  # clip the value loss as well
    ent_coef: NonNegativeFloat = 0.0  # entropy coefficient; the entropy is estimated from samples
    vf_coef: NonNegativeFloat = 1.0  # value-loss coefficient
    max_grad_norm: PositiveFloat = 1.0  # norm to which gradients are clipped
    critic_hidden_dims: Tuple[PositiveInt, ...] = (32,)  # widths of the critic's hidden layers

    num_flow_layers: PositiveInt = 4  # coupling layers K; fewer than 3 cannot let every dimension act on every other
    hidden_dim: PositiveInt = 64  # width of the policy's networks
    hidden_layers: PositiveInt = 1  # hidden layers of each coupling network
    scale_fn: Literal["tanh", "clip", "none", "zero", "asymmetric"] = "tanh"  # bound of the log-scale (Sec. 4)
    scale_bound: PositiveFloat = 0.5  # the bound l of the log-scale, for tanh and clip
    base_std: PositiveFloat = 1.0  # the base distribution's deviation at the start
    learned_base_std: bool = False  # learn the base's deviation; the paper does not
    action_noise: NonNegativeFloat = 0.0  # deviation of noise added to the actions that are trained on (Sec. 5.1)

    def __post_init__(self):
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches or batch_size == self.num_minibatches:
            allowed = f"a divisor of num_envs * num_steps = {batch_size} that leaves two samples or more"
            raise ValueError(f"--num-minibatches is {self.num_minibatches}, allowed is {allowed}")
        if self.total_timesteps < batch_size:
            raise ValueError(
                f"--total-timesteps is {self.total_timesteps}, allowed is one batch, {batch_size}, or more"
            )
        if self.anneal_lr and self.desired_kl is not None:
            raise ValueError("--anneal-lr and --desired-kl are given, allowed is one: both set the learning rate")
        if (self.export_jit or self.export_onnx) and (self.evaluate is None or self.temperature > 0):
            raise ValueError("an export needs --evaluate RUN, and --temperature 0: the file holds no noise")


class FlowPolicy(nn.Module):
    """A conditional RealNVP as a policy (Eq. 6, Sec. A.7). To use it elsewhere, copy it with the two definitions below.
    The `num_layers` (K) coupling layers keep an action's even- and odd-indexed dimensions in turn; `scale_fn` and
    `scale_bound` (l) bound their log-scales. The base is N(0, diag(sigma^2)) with sigma = `base_std`, 1 in the paper.
    Raises KeyError for an unknown `scale_fn`, ValueError for a `base_std` that is not above 0."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dim: int = 64,
        num_layers: int = 4,
        scale_bound: float = 0.5,
        scale_fn: str = "tanh",
        hidden_layers: int = 1,
        base_std: float = 1.0,
        learned_base_std: bool = False,
    ):
        super().__init__()
        even, odd = torch.arange(action_dim)[0::2], torch.arange(action_dim)[1::2]
        self.register_buffer("interleave", torch.cat((even, odd)).argsort(), persistent=False)  # undoes the split
        self.layers = nn.ModuleList()
        for j in range(num_layers):
            sizes = (len(odd), len(even)) if j % 2 else (len(even), len(odd))
            self.layers.append(CouplingLayer(*sizes, hidden_dim, hidden_layers, scale_fn, scale_bound))
        # The observation is the same in every layer, so its part of the K first matrix products is one product.
        self.obs_encoder = linear(obs_dim, num_layers * hidden_dim)
        self.base_log_std = nn.Parameter(torch.full((action_dim,), math.log(base_std)), requires_grad=learned_base_std)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|o) = log N(f(a; o); 0, diag(sigma^2)) + log|det df/da| (Eq. 6). (B, obs_dim), (B, D) -> (B,)."""
        z, log_det = self.forward(obs, action)
        return self.base_log_prob(z) + log_det

    def sample(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw actions (Algorithm 1, lines 4-6). (B, obs_dim) -> actions (B, D), their log-probabilities (B,).
        `temperature` multiplies the base's deviation, but not in the log-probability; 0 is deterministic (Sec. A.6)."""
        z = obs.new_zeros(*obs.shape[:-1], len(self.base_log_std))
        if temperature > 0:
            z = temperature * self.base_log_std.exp() * torch.randn_like(z)
        action, log_det = self.inverse(obs, z)
        return action, self.base_log_prob(z) - log_det

    def base_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log N(z; 0, diag(sigma^2)). (B, D) -> (B,)."""
        scaled = z * (-self.base_log_std).exp()
        return (-0.5 * (scaled.square() + math.log(2 * math.pi)) - self.base_log_std).sum(-1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f of the paper: actions (B, D) to latents (B, D) and log|det dz/da| (B,)."""
        kept, other, log_scales = action[..., 0::2], action[..., 1::2], []
        for layer, obs_features in zip(self.layers, self.obs_encoder(obs).chunk(len(self.layers), dim=-1)):
            log_scale, shift = layer(obs_features, kept)
            other = other * log_scale.exp() + shift  # Eq. 6
            log_scales.append(log_scale)
            kept, other = other, kept
        even, odd = (other, kept) if len(self.layers) % 2 else (kept, other)
        log_scales = torch.cat(log_scales, dim=-1)
        self.log_scales = log_scales.detach()  # to look at: the paper diagnoses instability with them
        return torch.cat((even, odd), dim=-1).index_select(-1, self.interleave), log_scales.sum(-1)

    def inverse(self, obs: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f^-1 of the paper, last layer first: latents (B, D) to actions (B, D) and log|det da/dz| (B,)."""
        even, odd, log_det = z[..., 0::2], z[..., 1::2], 0.0
        kept, other = (odd, even) if len(self.layers) % 2 else (even, odd)
        all_features = self.obs_encoder(obs).chunk(len(self.layers), dim=-1)
        for layer, obs_features in zip(reversed(self.layers), reversed(all_features)):
            kept, other = other, kept
            log_scale, shift = layer(obs_features, kept)
            other = (other - shift) * (-log_scale).exp()
            log_det = log_det - log_scale.sum(-1)
        return torch.cat((kept, other), dim=-1).index_select(-1, self.interleave), log_det


class CouplingLayer(nn.Module):
    """The networks s_j and t_j of one coupling layer f_j (Eq. 6): two halves of the output of one network."""

    SCALE_FNS = {  # how a log-scale s is bounded: the paper's one trick, and what it is compared with (Sec. 4, Fig. 2)
        "tanh": lambda s, bound: bound * torch.tanh(s),
        "clip": lambda s, bound: s.clamp(-bound, bound),
        "none": lambda s, bound: s,
        "zero": lambda s, bound: torch.zeros_like(s),  # only shifts, as in NICE
        # Andrade (2024): (2/pi) alpha arctan(s/alpha), with alpha 0.1 for growth and 2 for shrinkage.
        "asymmetric": lambda s, _: 2 / torch.pi * torch.where(s < 0, 2.0 * (s / 2.0).atan(), 0.1 * (s / 0.1).atan()),
    }

    def __init__(self, kept_dim, transformed_dim, hidden_dim, hidden_layers, scale_fn, scale_bound):
        super().__init__()
        self.scale_fn, self.scale_bound = self.SCALE_FNS[scale_fn], scale_bound
        self.kept_weight = nn.Parameter(linear(kept_dim, hidden_dim).weight.data)  # the bias is in `obs_encoder`
        self.hidden = nn.ModuleList(linear(hidden_dim, hidden_dim) for _ in range(hidden_layers - 1))
        self.out = linear(hidden_dim, 2 * transformed_dim, gain=0.01)  # small: at first f_j is nearly the identity

    def forward(self, obs_features: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, hidden_dim) and kept part (B, |d|) to bounded log-scale and shift, each (B, D - |d|)."""
        # Nothing is kept of an action of one dimension, every other time, and old ONNX runtimes refuse empty products.
        hidden = torch.tanh(obs_features + (nn.functional.linear(kept, self.kept_weight) if kept.shape[-1] else 0.0))
        for layer in self.hidden:
            hidden = torch.tanh(layer(hidden))
        scale, shift = self.out(hidden).chunk(2, dim=-1)
        return self.scale_fn(scale, self.scale_bound), shift


def linear(in_dim: int, out_dim: int, gain: float = 2**0.5) -> nn.Linear:
    """A linear layer, orthogonal with zero bias as in CleanRL; an empty one where an action has one dimension."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Critic(nn.Sequential):
    """The value function V(o): an ELU network, (B, obs_dim) -> (B,)."""

    def __init__(self, obs_dim: int, hidden_dims: tuple[int, ...] = (32,)):
        hidden = [(linear(*sizes), nn.ELU()) for sizes in zip((obs_dim, *hidden_dims), hidden_dims)]
        super().__init__(*sum(hidden, ()), linear(hidden_dims[-1], 1, gain=1.0), nn.Flatten(-2))


@torch.no_grad()
def collect_rollout(agent, envs, act, args: Args) -> tuple[torch.Tensor, ...]:
    """Algorithm 1, lines 2-9: T steps of N environments. `act` is `agent.act`, maybe compiled. Returns the buffer B:
    normalized observations (T, N, obs_dim), actions (T, N, D) and, each (T, N), their log-probabilities, scaled
    rewards, values, values of the state that followed, terminated, done, resetting: steps that were a reset only."""
    steps = []
    for _ in range(args.num_steps):
        if args.normalize_obs:
            agent.obs_stats.update(envs.obs)
        obs, action, log_prob = act(envs.obs)  # lines 4-6
        reward, terminated, done, resetting = envs.step(action)  # line 7
        steps.append((obs, action, log_prob, args.reward_scale * reward, terminated, done, resetting))
    obs, actions, log_probs, rewards, terminated, done, resetting = (torch.stack(x) for x in zip(*steps))
    all_obs = torch.cat((obs, agent.normalize(envs.obs)[None]))  # (T + 1, N, obs_dim)
    values = agent.critic(all_obs[..., agent.critic_obs])  # one batch is faster than T small ones
    next_values = values[1:]
    if envs.resets_in_step:
        # A time limit is no death, but the state that it cut off is never seen: the one before stands in, as in rsl_rl.
        next_values = torch.where(done & ~terminated, values[:-1], next_values)
    return obs, actions, log_probs, rewards, values[:-1], next_values, terminated, done, resetting


def compute_gae(rewards, values, next_values, terminated, done, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalized advantage estimation (Algorithm 1, line 10; Schulman et al. 2016, Eq. 16). All (T, N).
    `next_values[t]` is the value of the state that really followed. `terminated` stops the bootstrap: that state had no
    future. `done` stops the trace: the next row is another episode. A time limit is done, but not terminated."""
    deltas = rewards + gamma * next_values.masked_fill(terminated.bool(), 0.0) - values
    decays = gamma * gae_lambda * (1 - done.to(values))
    advantages, last = torch.zeros_like(values), torch.zeros_like(values[0])
    for t in reversed(range(len(values))):
        last = advantages[t] = deltas[t] + decays[t] * last
    return advantages


def ppo_gradient(agent, args: Args, obs, actions, old_log_probs, advantages, returns, old_values):
    """The function `update` of Algorithm 1, lines 19-23, on a minibatch (B, ...): its gradient and five statistics."""
    policy_obs = obs[..., agent.policy_obs]
    log_ratio = agent.policy.log_prob(policy_obs, actions) - old_log_probs
    ratio = log_ratio.exp()  # r(theta), line 22
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # Eq. 2, line 23
    values = agent.critic(obs[..., agent.critic_obs])
    errors = (values - returns).square()
    if args.clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        errors = torch.max(errors, (clipped_values - returns).square())
    value_loss = 0.5 * errors.mean()
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef > 0:
        # No closed form: -E[log pi(a)] over samples of the current policy, differentiated through the samples.
        loss = loss + args.ent_coef * agent.policy.sample(policy_obs)[1].mean()
    gradients = torch.autograd.grad(loss, agent.trained(), allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()  # Schulman's low-variance estimator, joschu.net/blog/kl-approx.html
        clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
        stats = torch.stack((policy_loss, value_loss, -log_ratio.mean(), approx_kl, clip_fraction))
    return parameters_to_vector(gradients).detach(), stats


def ppo_update(agent, optimizer, args: Args, rollout: tuple[torch.Tensor, ...], gradient_fn) -> dict[str, float]:
    """Algorithm 1, lines 10-17: advantages, N epochs of M minibatches, and what they measured. `optimizer` holds one
    vector that all parameters are views of, so that one operation averages, clips or steps them all."""
    obs, actions, log_probs, rewards, values, next_values, terminated, done, resetting = rollout
    advantages = compute_gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
    returns = advantages + values
    if args.action_noise > 0:  # Sec. 5.1; the ratio compares both policies at the same, noisy action
        actions = actions + args.action_noise * torch.randn_like(actions)
        with torch.no_grad():
            log_probs = agent.policy.log_prob(obs[..., agent.policy_obs], actions)
    batch = [x.flatten(0, 1) for x in (obs, actions, log_probs, advantages, returns, values)]
    usable = (~resetting).flatten().nonzero().flatten()  # rows of steps whose action did something
    if len(usable) == 0:
        raise FloatingPointError("the simulation of every environment is broken, and resetting them does not help")
    usable = usable[torch.randperm(len(usable), device=obs.device)]
    (parameters,) = optimizer.param_groups[0]["params"]
    all_stats = []
    for _ in range(args.update_epochs):
        # All minibatches have the same size: some usable rows come twice, in place of those that are not.
        permutation = usable[torch.randperm(len(batch[0]), device=obs.device) % len(usable)]
        for minibatch in zip(*(x[permutation].chunk(args.num_minibatches) for x in batch)):
            gradient, stats = gradient_fn(*minibatch)
            for x in (gradient, stats) if dist.is_initialized() else ():  # data parallelism: the processes' mean
                dist.all_reduce(x)
                x /= dist.get_world_size()
            norm = gradient.norm()
            parameters.grad = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            if args.desired_kl is not None:  # rsl_rl's rule, PPO-adaptive of the paper
                kl, group = stats[3].item(), optimizer.param_groups[0]
                factor = 1 / 1.5 if kl > 2 * args.desired_kl else 1.5 if 0 < kl < args.desired_kl / 2 else 1.0
                group["lr"] = min(max(factor * group["lr"], 1e-5), 1e-2)
            optimizer.step()  # line 24
            all_stats.append(torch.cat((stats, norm[None])))
    names = "policy_loss value_loss old_approx_kl approx_kl clipfrac grad_norm entropy explained_variance".split()
    last_epoch = torch.stack(all_stats[-args.num_minibatches :]).mean(0)
    explained = 1 - (returns - values).var() / (returns.var() + 1e-8)
    numbers = [*last_epoch.tolist(), -rollout[2].mean().item(), explained.item()]  # entropy of the policy that acted
    metrics = {f"losses/{name}": number for name, number in zip(names, numbers)}
    if isinstance(agent.policy, FlowPolicy):  # what the paper diagnoses instability with (Fig. 2)
        _, log_det = agent.policy.forward(obs[..., agent.policy_obs], actions)
        sizes = agent.policy.log_scales.abs()
        metrics["flow/log_det"], metrics["flow/scale_abs_mean"] = log_det.mean().item(), sizes.mean().item()
        metrics["flow/scale_saturation"] = (sizes > 0.95 * args.scale_bound).float().mean().item()
    return metrics


def train(args: Args, policy_class: type = FlowPolicy) -> dict:
    """Algorithm 1 with logging and checkpoints. Returns the last metrics, `run_dir` and `episodic_return` among them.

    `policy_class(obs_dim, action_dim)` is a module with `sample` and `log_prob`; what else it names, `args` gives it.
    Raises BadInput, and FloatingPointError where parameters are no longer finite."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():  # torchrun started this process, one of many
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
        if args.device != "cpu":
            args = dataclasses.replace(args, device=f"cuda:{os.environ['LOCAL_RANK']}")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(args.torch_threads)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    new = {"run_dir": Path(args.runs_dir, name), "global_step": 0, "returns": []}
    checkpoint = load_checkpoint(args.resume) if args.resume else new
    run_dir, global_step, returns = (checkpoint[key] for key in new)
    envs = make_envs(args, args.num_envs, args.seed + rank + global_step)
    torch.manual_seed(args.seed)  # every process starts from the same networks
    agent = Agent(args, policy_class, *envs.sizes).to(args.device)
    parameters = nn.Parameter(parameters_to_vector(agent.trained()).detach())
    vector_to_parameters(parameters.data, agent.trained())  # from here on they are views of one vector
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, fused=True)
    torch.manual_seed(args.seed + rank + global_step)  # but has noise, episodes and minibatches of its own
    if args.resume:
        load_checkpoint(args.resume, agent)
        optimizer.load_state_dict(checkpoint["optimizer"])
        vars(envs.env).update(checkpoint["curriculum"])
        print("Isaac Gym cannot be continued within its episodes: new ones start.")
    envs.reset(args.random_initial_steps)
    writer, lock = open_run(args, run_dir, global_step, envs.cfg) if rank == 0 else (None, None)
    act, gradient_fn = agent.act, partial(ppo_gradient, agent, args)
    if args.compile and (shutil.which("g++") is None or envs.sizes[2] == 1):
        print("Without g++, or for one action, PyTorch 2.4.1 compiles nothing or wrongly: going on eagerly, slower.")
    elif args.compile:
        act, gradient_fn = torch.compile(act), torch.compile(gradient_fn)

    batch_size = args.num_envs * args.num_steps * world_size
    num_iterations = args.total_timesteps // batch_size
    start_step, start_time, metrics, mean_return = global_step, time.time(), {}, float(np.mean(returns or np.nan))
    bar = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", disable=rank > 0, **BAR)
    for iteration in range(global_step // batch_size, num_iterations):
        if args.desired_kl is None:  # else the KL divergence sets the learning rate
            fraction = 1 - iteration / num_iterations if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = fraction * args.learning_rate
        rollout = collect_rollout(agent, envs, act, args)  # lines 2-9
        metrics = ppo_update(agent, optimizer, args, rollout, gradient_fn)  # lines 10-17
        if not parameters.isfinite().all():
            raise FloatingPointError(f"the parameters of {run_dir} are not finite after step {global_step}")
        global_step += batch_size
        episodes, terms = envs.pop()
        returns = (returns + [episodic_return for episodic_return, _ in episodes])[-100:]
        mean_return = float(np.mean(returns or np.nan))
        bar.set_postfix_str(f"return {mean_return:.2f}, KL {metrics['losses/approx_kl']:.3f}", refresh=False)
        bar.update(batch_size)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = int((global_step - start_step) / (time.time() - start_time))
        metrics["charts/broken_episodes"] = envs.broken_episodes
        if episodes:
            metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes, axis=0).tolist()
        metrics.update(terms)
        for name, value in metrics.items() if rank == 0 else ():
            writer.add_scalar(name, value, global_step)
        keep = args.keep_interval is not None and (iteration + 1) % args.keep_interval == 0
        if rank == 0 and (keep or iteration % args.checkpoint_interval == 0 or iteration + 1 == num_iterations):
            state = {"args": dataclasses.asdict(args), "global_step": global_step, "returns": returns}
            state.update(agent=agent.state_dict(), optimizer=optimizer.state_dict())
            state.update(sizes=envs.sizes, curriculum=envs.curriculum())
            for name in ["checkpoint.pt", f"checkpoint-{global_step}.pt"][: 1 + keep]:
                save_checkpoint(run_dir / name, state)
    for resource in (bar, writer) if rank == 0 else (bar,):
        resource.close()
    if dist.is_initialized():
        dist.barrier()  # a process that leaves early, while another still writes, was seen to hang
    return {**metrics, "run_dir": str(run_dir), "global_step": global_step, "episodic_return": mean_return}


class RunningMeanStd(nn.Module):
    """Mean and variance of a stream over all processes, in float64 (Chan et al. 1983). Starts as a weak unit sample."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.full((1,), 1e-4, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))

    def update(self, batch: torch.Tensor) -> None:
        """Take in a batch (B, size) of each process."""
        deviation = batch - self.mean
        sums = torch.stack((torch.full_like(self.mean, len(batch)), deviation.sum(0), deviation.square().sum(0)))
        if dist.is_initialized():
            dist.all_reduce(sums)
        self.count += sums[0, :1]
        shift = sums[1] / self.count
        self.var.copy_((self.var * (self.count - sums[0, :1]) + sums[2]) / self.count - shift.square())
        self.mean += shift


class Agent(nn.Module):
    """Policy, critic and running statistics in one module: whoever saves it saves all that the policy needs. An
    observation is what the policy sees, then what the critic sees if that is something else. Actions go to the task as
    they are: legged_gym clips them at +-100 and multiplies by its `action_scale`, IsaacGymEnvs clips them at +-1, and
    the programs that run such policies on robots do the same."""

    def __init__(self, args: Args, policy_class: type, obs_dim: int, privileged_dim: int, action_dim: int):
        super().__init__()
        self.normalize_obs, self.policy_obs = args.normalize_obs, slice(0, obs_dim)
        self.critic_obs = slice(obs_dim, None) if privileged_dim else self.policy_obs
        options = {**vars(args), "num_layers": args.num_flow_layers}
        named = {name: options[name] for name in inspect.signature(policy_class).parameters if name in options}
        self.policy = policy_class(obs_dim, action_dim, **named)
        self.critic = Critic(privileged_dim or obs_dim, args.critic_hidden_dims)
        self.obs_stats = RunningMeanStd(obs_dim + privileged_dim)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """With --normalize-obs, raw observations (..., obs_dim) to zero mean and unit variance, clipped to +-10."""
        if not self.normalize_obs:
            return obs
        size = obs.shape[-1]  # without what only the critic sees, where a deployed policy acts
        mean, std = self.obs_stats.mean[:size], (self.obs_stats.var[:size] + 1e-8).sqrt()
        return ((obs - mean.float()) / std.float()).clamp(-10, 10)  # float32 as on a robot

    def act(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
        """Raw observations (N, obs_dim) to normalized ones, actions and log-probabilities."""
        obs = self.normalize(obs)
        return (obs, *self.policy.sample(obs[..., self.policy_obs], temperature))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """What a robot runs: raw observations (B, obs_dim) to deterministic actions (B, D), not clipped or scaled."""
        return self.act(obs, temperature=0.0)[1]


class Environments:
    """N environments stepped together on one device, and what one rollout hands to the next. A simulation whose numbers
    break ends its own episode and no other. Only `pop` waits for the device.

    A task either resets an environment in the step that ends its episode, whose last observation is never seen
    (`resets_in_step`), or in the next one, which must not be trained on. `reset_next(mask)` has the next step reset
    those of a mask (N,)."""

    def __init__(self, env, cfg: dict, sizes: tuple, resets_in_step: bool, reset_next, num_envs: int, args: Args):
        self.env, self.cfg, self.sizes, self.env_id = env, cfg, sizes, args.env_id  # sizes as `Agent` takes them
        self.resets_in_step, self.reset_next = resets_in_step, reset_next
        self.obs = torch.zeros(num_envs, sizes[0] + sizes[1], device=args.device)
        self.episode_return, self.episode_length = torch.zeros(2, num_envs, device=args.device)
        # Whose next step only resets them, and how many episodes of each have broken since `pop`.
        self.resetting, self.broken = self.episode_return.bool(), self.episode_return.long()
        self.broken_episodes, self.ended, self.terms = 0, [], {}

    def reset(self, random_initial_steps: bool) -> None:
        """Start an episode in every environment."""
        self.resetting = torch.ones_like(self.resetting)
        self.reset_next(self.resetting)
        self.step(torch.zeros(len(self.obs), self.sizes[2], device=self.obs.device))
        self.ended, self.terms = [], {}
        if random_initial_steps:
            steps = self.env.episode_length_buf if self.resets_in_step else self.env.progress_buf
            steps.copy_(torch.randint_like(steps, high=int(self.env.max_episode_length) - 1))

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Actions (N, D) to rewards, terminated, done and whether the step only reset an environment, all (N,)."""
        obs, *others = self.env.step(action)
        if not self.resets_in_step:
            obs, *others = obs["obs"], obs.get("states"), *others
        privileged, reward, done, infos = others
        obs = obs if privileged is None else torch.cat((obs, privileged), dim=-1)
        done, resetting = done.bool(), self.resetting
        # legged_gym's `infos` is one dict for ever, written only in steps in which an environment is done, else old.
        time_out = infos["time_outs"].bool() if "time_outs" in infos else torch.zeros_like(done)
        terms = {name: x for name, x in infos.items() if torch.is_tensor(x) and x.dim() == 0}
        for name, mean in {**terms, **infos.get("episode", {})}.items():  # over those that were reset in this step
            self.terms.setdefault(f"episode/{name}", []).append(torch.stack((done.sum(), done.sum() * mean)))
        reward = reward.masked_fill(resetting, 0.0)
        broken = ~(torch.cat((obs, reward[:, None]), dim=-1).abs() < 1e10).all(-1)  # a NaN is broken, too
        reward = reward.masked_fill(broken, 0.0)
        self.obs = torch.where(broken[:, None], self.obs, obs)  # a copy, since simulators use their buffers again
        self.broken += broken
        self.reset_next(broken)
        self.resetting = broken if self.resets_in_step else broken | done
        terminated, done = done & ~time_out & ~broken, done | broken
        self.episode_return, self.episode_length = self.episode_return + reward, self.episode_length + ~resetting
        # A fallen Anymal is done again in the step that resets it, which is no second episode.
        self.ended.append(torch.stack((done & ~resetting, self.episode_return, self.episode_length)))
        self.episode_return, self.episode_length = self.ended[-1][1:].masked_fill(done, 0.0)
        return reward, terminated, done, resetting

    def pop(self) -> tuple[list, dict]:
        """[return, length] of each episode that ended since the last call, and {name: mean} of the task's own terms."""
        ended = torch.stack(self.ended)  # (T, 3, N)
        episodes = ended[:, 1:].transpose(1, 2)[ended[:, 0].bool()].tolist()
        rows = {name: torch.stack(rows) for name, rows in self.terms.items()}  # (T, 2): number of resets, number * mean
        sums = {name: x[x.isfinite().all(-1)].sum(0).tolist() for name, x in rows.items()}
        if self.broken.any():
            where = self.broken.nonzero().flatten().tolist()[:10]
            tqdm.write(f"{self.env_id}, environment {where}: a reward or observation is broken, so its episode ends")
        self.broken_episodes += self.broken.sum().item()
        self.broken.zero_()
        self.ended, self.terms = [], {}
        return episodes, {name: total / count for name, (count, total) in sums.items() if count}

    def curriculum(self) -> dict:
        """What a task carries from episode to episode; NumPy's numbers become Python's."""
        names = "command_ranges", "common_step_counter", "success_tolerance"
        found = {name: value for name, value in vars(self.env).items() if name in names}
        return json.loads(json.dumps(found, default=float))


class BadInput(ValueError):
    """What the user has to change; `main` prints it as one line."""


def make_legged_gym(module: str, task: str, num_envs: int, seed: int, args: Args) -> Environments:
    """A task of Unitree RL Gym, or one that `module` registers with legged_gym."""
    from isaacgym import gymapi
    from legged_gym.utils import class_to_dict, task_registry

    for name in ("legged_gym.envs", module or "legged_gym"):
        importlib.import_module(name)  # registers its tasks
    if task not in task_registry.task_classes:
        raise BadInput(f"allowed are {', '.join(sorted(task_registry.task_classes))}")
    cfg, train_cfg = task_registry.get_cfgs(task)
    train_cfg.seed = seed  # where `make_env` takes its seed from
    if not args.randomize:
        cfg.noise.add_noise = cfg.domain_rand.randomize_friction = cfg.domain_rand.push_robots = False
    # Without a namespace, `make_env` would parse this script's command line and refuse it.
    settings = {"sim_device": args.device, "headless": args.headless, "num_envs": num_envs, "num_threads": 0}
    on_gpu = {"use_gpu": args.device != "cpu", "use_gpu_pipeline": args.device != "cpu"}
    settings = argparse.Namespace(physics_engine=gymapi.SIM_PHYSX, subscenes=0, **settings, **on_gpu)
    env, cfg = task_registry.make_env(task, settings)
    sizes, limit = (env.num_obs, env.num_privileged_obs or 0, env.num_actions), int(env.max_episode_length)
    reset_next = lambda mask: env.episode_length_buf.masked_fill_(mask, limit)  # noqa: E731
    return Environments(env, class_to_dict(cfg), sizes, True, reset_next, num_envs, args)


def make_isaacgymenvs(module: str, task: str, num_envs: int, seed: int, args: Args) -> Environments:
    """A task of IsaacGymEnvs."""
    if task.startswith(("AnymalTerrain", "HumanoidAMP")):
        raise BadInput("it does not reset like the other tasks, in the step after an episode's end")
    if args.device == "cpu" or not args.randomize:  # `make` would go on with what IsaacGymEnvs' own files say
        raise BadInput("allowed are neither --device cpu nor --no-randomize: IsaacGymEnvs' cfg folder decides that")
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):  # `make` does nothing with its seed
        set_seed(seed)
    devices = {"sim_device": args.device, "rl_device": args.device, "graphics_device_id": int(args.device[5:])}
    show = {"headless": args.headless, "force_render": not args.headless}
    env = importlib.import_module(module).make(seed=seed, task=task, num_envs=num_envs, **devices, **show)
    sizes = env.num_obs, env.num_states or 0, env.num_acts
    return Environments(env, env.cfg, sizes, False, lambda mask: env.reset_buf.masked_fill_(mask, 1), num_envs, args)


def make_envs(args: Args, num_envs: int, seed: int) -> Environments:
    """The process's environments, which Isaac Gym can make once. Raises BadInput with the reason if it cannot."""
    module, _, task = args.env_id.rpartition(":")
    try:
        if args.device != "cpu":
            torch.cuda.set_device(args.device)
        make = make_isaacgymenvs if module == "isaacgymenvs" else make_legged_gym
        return make(module, task, num_envs, seed, args)
    except Exception as error:  # whatever a simulator raises, its user wants the sentence, not the stack
        reason = str(error) or type(error).__name__
        if isinstance(error, ImportError):
            reason += "; needed are, on Python 3.8, Isaac Gym Preview 4 (https://developer.nvidia.com/isaac-gym) and "
            reason += "https://github.com/unitreerobotics/unitree_rl_gym or https://github.com/isaac-sim/IsaacGymEnvs"
        raise BadInput(f"--env-id is {args.env_id} on {args.device}, which does not work: {reason}") from error


def open_run(args: Args, run_dir: Path, global_step: int, cfg: dict) -> tuple:
    """The run's log, on W&B too with --track, and the lock that keeps a second process away."""
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise BadInput(f"{run_dir} is in use: another process trains there") from error
    # Whoever deploys the policy compares this with the robot: action scale, default angles, gains, ...
    (run_dir / "env_cfg.json").write_text(json.dumps(cfg, indent=2, default=str))
    config = dataclasses.asdict(args)
    if args.track:
        import wandb

        wandb.init(id=run_dir.name, resume="allow", sync_tensorboard=True, config=config, allow_val_change=True)
    writer = SummaryWriter(str(run_dir), purge_step=global_step + 1)  # what is computed again is not logged twice
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in config.items()))
    return writer, lock


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write atomically: whoever reads `path`, whenever, finds a whole checkpoint."""
    torch.save(checkpoint, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: str | Path, agent: Optional[Agent] = None) -> dict:
    """The checkpoint of a run folder or a file, and its `run_dir`; parameters go into `agent`. Raises BadInput."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)  # a stranger's file cannot run code
        checkpoint.update({"args": Args(**checkpoint["args"]), "run_dir": file.parent})
        if agent:
            agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # torch.load has no error class of its own
        raise BadInput(f"{str(path)!r} holds no checkpoint that fits: {str(error) or type(error).__name__}") from error
    return checkpoint


@torch.no_grad()
def evaluate(checkpoint: str | Path, policy_class: type = FlowPolicy, **flags) -> list[float]:
    """Export a trained policy and play it, its statistics frozen; print and return its episodes' undiscounted returns.

    `flags` are fields of `Args` other than the run's: `eval_episodes`, `temperature`, `device`, `export_jit`, ... Each
    episode has an environment of its own. Raises BadInput for a checkpoint that cannot be played."""
    state = load_checkpoint(checkpoint)
    args = dataclasses.replace(state["args"], **{**flags, "evaluate": str(checkpoint)})
    envs = make_envs(args, args.eval_episodes, args.seed) if args.eval_episodes else None
    agent = Agent(args, policy_class, *(envs.sizes if envs else state["sizes"])).eval()
    load_checkpoint(checkpoint, agent)
    export(agent, args.export_jit, args.export_onnx)
    if envs is None:
        return []
    agent.to(args.device)
    torch.manual_seed(args.seed)
    envs.reset(random_initial_steps=False)
    results = torch.zeros(2, args.eval_episodes, device=args.device)  # return and length of each one's first episode
    playing = results[0] == 0
    with tqdm(total=args.eval_episodes, **BAR) as bar:
        while playing.any():
            envs.step(agent.act(envs.obs, args.temperature)[1])
            ends = playing & envs.ended[-1][0].bool()
            results, playing = torch.where(ends, envs.ended[-1][1:], results), playing & ~ends
            bar.update(ends.sum().item())
    (returns, lengths), (_, terms) = results, envs.pop()
    mean = f"return {returns.mean():.2f} ± {returns.std(unbiased=False):.2f}, length {lengths.mean():.1f}"
    mean += "".join(f", {name} {value:.4g}" for name, value in terms.items())
    print(f"{len(returns)} episodes of {args.env_id} at temperature {args.temperature:g}: {mean}")
    return returns.tolist()


def export(agent: Agent, jit: Optional[str], onnx: Optional[str]) -> None:
    """Write the deterministic policy as TorchScript and as ONNX: raw float32 `obs` (B, obs_dim) to actions (B, D).

    Raises FloatingPointError where a file would compute something else than the policy: it must not reach a robot."""
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # of sizes that are constants indeed
    agent, size = agent.float(), agent.policy_obs.stop
    obs = torch.randn(256, size, generator=torch.Generator().manual_seed(0))
    if agent.normalize_obs:  # spread as in training
        obs = obs * agent.obs_stats.var[:size].sqrt() + agent.obs_stats.mean[:size]
    for path in filter(None, (jit, onnx)):
        file = io.BytesIO()
        if path == jit:
            torch.jit.save(torch.jit.freeze(torch.jit.trace(agent, obs[:1])), file)
            found = torch.jit.load(io.BytesIO(file.getvalue()))(obs)
        else:
            import onnxruntime

            names = {"input_names": ["obs"], "output_names": ["continuous_actions"]}
            options = {"opset_version": 17, "dynamic_axes": {name: {0: "batch"} for (name,) in names.values()}}
            torch.onnx.export(agent, (obs[:1],), file, **names, **options)  # robots' runtimes read opset 17
            session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"obs": obs.numpy()})[0])
        if not torch.allclose(found, agent(obs), rtol=1e-5, atol=1e-5):
            raise FloatingPointError(f"{path} would act differently from the policy, and is not written")
        Path(path).write_bytes(file.getvalue())
        print(f"Wrote {path}; it acts as the policy on {len(obs)} observations.")


def main(policy_class: type = FlowPolicy, defaults: Optional[Args] = None) -> None:
    """The command line: train, or resume or evaluate a run, whose own arguments then are the flags' defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", "--evaluate", dest="run")
    run = parser.parse_known_args()[0].run
    try:
        if run is not None:
            defaults = dataclasses.replace(load_checkpoint(run)["args"], resume=None)
        args = tyro.cli(Args, default=defaults or Args(), description=__doc__.split("\n")[0])
        if args.evaluate is not None:
            evaluate(args.evaluate, policy_class, **dataclasses.asdict(args))
        else:
            run_dir = shlex.quote(train(args, policy_class)["run_dir"])
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"Play it: python {sys.argv[0]} --evaluate {run_dir} [--no-headless] [--export-jit policy.pt]")
    except (BadInput, FloatingPointError, OSError) as error:
        tqdm.write("error: " + " ".join(str(error).split()), file=sys.stderr)  # on a line of its own, beside a bar too
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)


if __name__ == "__main__":
    main()
