"""NFPO on Gymnasium and EnvPool: PPO whose policy is a normalizing flow instead of a Gaussian.

Paper: "NFPO: Stabilized Policy Optimization of Normalizing Flow for Robotic Policy Learning" (Shi et al., 2026).
  1. A RealNVP flow f, conditioned on the observation o, maps an action a to a latent z = f(a; o) that is N(0, I).
     The change of variables gives its exact density: log pi(a|o) = log N(z; 0, I) + log|det df/da|.
  2. To act, draw z and run f backwards. PPO needs nothing else from a policy, so the rest of it stays as it is.
  3. Left alone, training inflates the determinant until numbers break. NFPO bounds each log-scale: l * tanh(s) (Eq. 6).
  4. To deploy, run f backwards from z = 0, the mode of the base distribution (Sec. A.6).
Run:  python nfpo_continuous_action.py --env-id Humanoid-v4   (a robot: --env-id Go1JoystickFlatTerrain-v1 --envpool)
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import tyro
from filelock import FileLock
from gymnasium.error import Error as BadInput
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import distributed as dist, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._pytree import tree_leaves
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

HUGE = 1e10  # a number that no simulator means
BAR = {"mininterval": 0.1 if sys.stderr.isatty() else 30, "unit_scale": True}  # in a log, a line every half minute
Json = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


@dataclass(config={"extra": "forbid", "allow_inf_nan": False})
class Args:
    env_id: str = "Humanoid-v4"  # Gymnasium's or EnvPool's id of an environment with Box actions, or `module:EnvId`
    env_kwargs: Json = dataclasses.field(default_factory=dict)  # arguments of the environment
    envpool: bool = False  # step the environments with EnvPool, in C++ threads
    async_envs: bool = False  # step each of Gymnasium's environments in a process of its own
    exp_name: str = "nfpo_continuous_action"  # name of this experiment, a part of the run's name
    seed: NonNegativeInt = 1  # seed of networks, noise, minibatches and environments
    total_timesteps: PositiveInt = 1_000_000  # environment steps to train for, over all environments and processes
    cuda: bool = False  # train on a GPU; networks this small are faster on the CPU
    compile: bool = True  # compile policy and update ahead of time; eager where no compiler works
    torch_threads: PositiveInt = 1  # PyTorch's threads; more than one slows small networks down
    runs_dir: str = "runs"  # folder that receives one folder per run
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT and WANDB_ENTITY say where
    capture_video: bool = False  # film episodes of the trained policy into the run's `videos` folder
    checkpoint_interval: PositiveInt = 50  # iterations between checkpoints; the last iteration always writes one
    keep_interval: Optional[PositiveInt] = None  # iterations between checkpoints that stay, as checkpoint-STEP.pt
    resume: Optional[str] = None  # run folder to continue; other flags override the run's own
    evaluate: Optional[str] = None  # run folder or checkpoint to play instead of training
    eval_episodes: PositiveInt = 10  # episodes that --evaluate plays, 10,000 steps long at most if nothing ends them
    temperature: NonNegativeFloat = 0.0  # factor on the base's deviation in --evaluate; 0 is the deterministic policy
    export_onnx: Optional[str] = None  # file that --evaluate writes the deterministic policy to
    learning_rate: PositiveFloat = 3e-4  # learning rate of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    num_envs: PositiveInt = 64  # parallel environments in each process
    num_steps: PositiveInt = 32  # steps of each environment in one rollout (T in Algorithm 1)
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99  # discount factor
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95  # lambda of generalized advantage estimation
    num_minibatches: PositiveInt = 32  # minibatches per epoch (M in Algorithm 1)
    update_epochs: PositiveInt = 10  # epochs over each rollout (N in Algorithm 1)
    norm_adv: bool = True  # normalize advantages within a minibatch
    clip_coef: Annotated[float, Field(gt=0, lt=1)] = 0.2  # clip range of the ratio (epsilon in Algorithm 1)
    clip_vloss: bool = True  # clip the value loss as well
    ent_coef: NonNegativeFloat = 0.0  # entropy coefficient; the entropy is estimated from samples
    vf_coef: NonNegativeFloat = 0.5  # value-loss coefficient
    max_grad_norm: PositiveFloat = 0.5  # norm to which gradients are clipped
    target_kl: Optional[PositiveFloat] = None  # approximate KL above which the remaining epochs are skipped
    num_flow_layers: PositiveInt = 4  # coupling layers K; fewer than 3 cannot let every dimension act on every other
    hidden_dim: PositiveInt = 64  # width of the policy's networks
    hidden_layers: PositiveInt = 1  # hidden layers of each coupling network
    scale_fn: Literal["tanh", "clip", "none", "zero", "asymmetric"] = "tanh"  # bound of the log-scale (Sec. 4)
    scale_bound: PositiveFloat = 0.5  # the bound l of the log-scale, for tanh and clip
    base_std: PositiveFloat = 0.5  # the base distribution's deviation at the start; the paper's is 1
    learned_base_std: bool = True  # learn the base's deviation; the paper does not
    action_noise: NonNegativeFloat = 0.0  # deviation of noise added to the actions that are trained on (Sec. 5.1)

    def __post_init__(self):
        size = self.num_envs * self.num_steps
        if size % self.num_minibatches or size == self.num_minibatches:
            raise ValueError(f"--num-minibatches is {self.num_minibatches}, allowed is a divisor of {size} below it")
        if self.total_timesteps < size:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, allowed is at least one batch, {size}")
        if self.export_onnx and (not self.evaluate or self.temperature > 0):
            raise ValueError("--export-onnx needs --evaluate RUN, and --temperature 0: the file holds no noise")


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
    """The value function V(o): a tanh network, (B, obs_dim) -> (B,)."""

    def __init__(self, obs_dim: int):
        hidden = linear(obs_dim, 64), nn.Tanh(), linear(64, 64), nn.Tanh()
        super().__init__(*hidden, linear(64, 1, gain=1.0), nn.Flatten(-2))


@torch.no_grad()
def collect_rollout(agent, envs, act, args: Args) -> tuple[torch.Tensor, ...]:
    """Algorithm 1, lines 2-9: T steps of N environments. `act` is `agent.act`, maybe compiled. Returns the buffer B:
    normalized observations (T, N, obs_dim), actions (T, N, D) before the box clips them, and, each (T, N), their
    log-probabilities, normalized rewards, values, values of the state that really followed, terminated, done."""
    steps, final_obs = [], []
    for _ in range(args.num_steps):
        agent.obs_stats.update(envs.obs)
        obs, action, log_prob, boxed_action = act(envs.obs)  # lines 4-6
        reward, terminated, done, final = envs.step(boxed_action)  # line 7
        envs.discounted_return.mul_(args.gamma).add_(reward)
        agent.return_stats.update(envs.discounted_return[:, None])
        reward = (reward / (agent.return_stats.var + 1e-8).sqrt()).clamp(-10, 10).float()
        envs.discounted_return[done] = 0.0  # the next episode's starts anew
        steps.append((obs, action, log_prob, reward, terminated, done))
        final_obs.append(final)
    obs, actions, log_probs, rewards, terminated, done = (torch.stack(x) for x in zip(*steps))
    all_obs = torch.cat((obs, agent.normalize(envs.obs)[None]))  # (T + 1, N, obs_dim)
    values = agent.critic(all_obs[..., agent.critic_obs])  # one batch is faster than T small ones
    next_values = values[1:].clone()  # but where an episode ended, that is the next one's first
    next_values[done] = agent.critic(agent.normalize(torch.cat(final_obs))[..., agent.critic_obs])
    return obs, actions, log_probs, rewards, values[:-1], next_values, terminated, done


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
    return parameters_to_vector(gradients), stats


def ppo_update(agent, optimizer, args: Args, rollout: tuple[torch.Tensor, ...], gradient_fn) -> dict[str, float]:
    """Algorithm 1, lines 10-17: advantages, N epochs of M minibatches, and what they measured. `optimizer` holds one
    vector that all parameters are views of, so that one operation averages, clips or steps them all."""
    obs, actions, log_probs, rewards, values, next_values, terminated, done = rollout
    advantages = compute_gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
    returns = advantages + values
    if args.action_noise > 0:  # Sec. 5.1; the ratio compares both policies at the same, noisy action
        actions = actions + args.action_noise * torch.randn_like(actions)
        with torch.no_grad():
            log_probs = agent.policy.log_prob(obs[..., agent.policy_obs], actions)
    batch = [x.flatten(0, 1) for x in (obs, actions, log_probs, advantages, returns, values)]
    (parameters,) = optimizer.param_groups[0]["params"]
    all_stats = []
    for _ in range(args.update_epochs):
        permutation = torch.randperm(len(batch[0]), device=obs.device)
        for minibatch in zip(*(x[permutation].chunk(args.num_minibatches) for x in batch)):
            gradient, stats = gradient_fn(*minibatch)
            for x in (gradient, stats) if dist.is_initialized() else ():  # data parallelism: the processes' mean
                dist.all_reduce(x)
                x /= dist.get_world_size()
            norm = gradient.norm()
            parameters.grad = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            optimizer.step()  # line 24
            all_stats.append(torch.cat((stats, norm[None])))
        if args.target_kl is not None and stats[3] > args.target_kl:
            break
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
        dist.init_process_group()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)  # every process starts from the same networks
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    new = {"run_dir": Path(args.runs_dir, name), "global_step": 0, "returns": []}
    checkpoint = load_checkpoint(args.resume) if args.resume else new
    run_dir, global_step, returns = (checkpoint[key] for key in new)
    envs = make_envs(args, args.num_envs, args.seed + rank * args.num_envs + global_step).to(device)
    agent = Agent(args, policy_class, envs).to(device)
    parameters = nn.Parameter(parameters_to_vector(agent.trained()).detach())
    vector_to_parameters(parameters.data, agent.trained())  # from here on they are views of one vector
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)
    act, gradient_fn = agent.act, partial(ppo_gradient, agent, args)
    if args.compile:
        print("Compiling; the first time it takes up to a minute (--no-compile starts at once).", flush=True)
        act, gradient_fn = compile_functions(agent, args, envs.obs, act, gradient_fn)
    torch.manual_seed(args.seed + rank + global_step)  # but has noise and minibatches of its own
    if args.resume:
        load_checkpoint(args.resume, agent)
        optimizer.load_state_dict(checkpoint["optimizer"])
        if len(checkpoint["envs"]["_extra_state"]) == args.num_envs and not dist.is_initialized():
            envs.load_state_dict(checkpoint["envs"])
            torch.set_rng_state(checkpoint["random"])
        else:
            print(f"{args.env_id} cannot be continued within its episodes: new ones have started.")
    writer, lock = open_run(args, run_dir, global_step) if rank == 0 else (None, None)
    batch_size = args.num_envs * args.num_steps * world_size
    num_iterations = args.total_timesteps // batch_size
    start_step, start_time, metrics, mean_return = global_step, time.time(), {}, float(np.mean(returns or np.nan))
    bar = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", disable=rank > 0, **BAR)
    for iteration in range(global_step // batch_size, num_iterations):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations if args.anneal_lr else 1)
        rollout = collect_rollout(agent, envs, act, args)  # lines 2-9
        metrics = ppo_update(agent, optimizer, args, rollout, gradient_fn)  # lines 10-17
        if not parameters.isfinite().all():
            raise FloatingPointError(f"the parameters of {run_dir} are not finite after step {global_step}")
        global_step += batch_size
        episodes, envs.episodes = envs.episodes, []
        returns = (returns + [episodic_return for episodic_return, _ in episodes])[-100:]
        mean_return = float(np.mean(returns or np.nan))
        bar.set_postfix_str(f"return {mean_return:.0f}, KL {metrics['losses/approx_kl']:.3f}", refresh=False)
        bar.update(batch_size)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = int((global_step - start_step) / (time.time() - start_time))
        metrics["charts/broken_episodes"] = envs.broken_episodes.item()
        if rank == 0:
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step)
            for episodic_return, length in episodes:
                writer.add_scalar("charts/episodic_return", episodic_return, global_step)
                writer.add_scalar("charts/episodic_length", length, global_step)
        keep = args.keep_interval is not None and (iteration + 1) % args.keep_interval == 0
        if rank == 0 and (keep or iteration % args.checkpoint_interval == 0 or iteration + 1 == num_iterations):
            state = {"args": dataclasses.asdict(args), "global_step": global_step, "returns": returns}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"envs": envs.state_dict(), "random": torch.get_rng_state()}
            for name in ["checkpoint.pt", f"checkpoint-{global_step}.pt"][: 1 + keep]:
                save_checkpoint(run_dir / name, state)
    for resource in (bar, envs.envs, writer) if rank == 0 else (bar, envs.envs):
        resource.close()
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
        self.count.add_(sums[0, :1])
        shift = sums[1] / self.count
        self.var.copy_((self.var * (self.count - sums[0, :1]) + sums[2]) / self.count - shift.square())
        self.mean.add_(shift)


class Agent(nn.Module):
    """Policy, critic and running statistics in one module: whoever saves it saves all that the policy needs. The policy
    acts in [-1, 1], which is rescaled to the environment's box. Where that is unbounded, actions pass through."""

    def __init__(self, args: Args, policy_class: type, envs):
        super().__init__()
        self.policy_obs, self.critic_obs, obs = envs.policy_obs, envs.critic_obs, envs.obs[0]
        options = {**vars(args), "num_layers": args.num_flow_layers}
        named = {name: options[name] for name in inspect.signature(policy_class).parameters if name in options}
        self.policy = policy_class(len(obs[self.policy_obs]), len(envs.low), **named)
        self.critic = Critic(len(obs[self.critic_obs]))
        self.obs_stats, self.return_stats = RunningMeanStd(len(obs)), RunningMeanStd(1)
        self.register_buffer("low", torch.from_numpy(envs.low).float())
        self.register_buffer("high", torch.from_numpy(envs.high).float())

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw observations (..., obs_dim) to zero mean and unit variance, clipped to +-10, float32."""
        size = obs.shape[-1]  # without the privileged state, which comes last, where a deployed policy acts
        return ((obs - self.obs_stats.mean[:size]) / (self.obs_stats.var[:size] + 1e-8).sqrt()).clamp(-10, 10).float()

    def act(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
        """Raw observations (N, obs_dim) to normalized ones, actions, log-probabilities and actions in the box."""
        obs = self.normalize(obs)
        action, log_prob = self.policy.sample(obs[..., self.policy_obs], temperature)
        boxed = torch.where(self.high - self.low < HUGE, self.low + (self.high - self.low) * (action + 1) / 2, action)
        return obs, action, log_prob, torch.minimum(torch.maximum(boxed, self.low), self.high)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """What a robot runs: raw observations (B, obs_dim) to deterministic actions (B, D) in the box."""
        return self.act(obs, temperature=0.0)[-1]


class Environments(nn.Module):
    """N environments of Gymnasium or EnvPool, stepped together, and what one rollout hands to the next. Final
    observations are the true ones, and a simulation whose numbers break ends its own episode and no other."""

    def __init__(self, envs, num_envs: int, reset, space: gym.Space, env_id: str):
        super().__init__()
        self.envs, self.reset, self.space, self.env_id = envs, reset, space, env_id
        obs = reset(np.ones(num_envs, dtype=bool))
        if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f":
            raise BadInput(f"actions are {space}, allowed is a Box of floats")
        if any(leaf.ndim < 2 or leaf.dtype == np.uint8 for leaf in tree_leaves(obs)):
            raise BadInput(f"observations are {envs.observation_space}, allowed are Boxes that are no images")
        self.low, self.high = space.low.ravel(), space.high.ravel()
        size = obs["state"].shape[1] if isinstance(obs, dict) and "privileged_state" in obs else None
        self.policy_obs, self.critic_obs = slice(size), slice(size, None)  # all of it, unless a part is privileged
        self.episodes = []  # [return, length] of those that have ended
        obs = self.flatten(obs)
        self.register_buffer("obs", torch.where(obs.abs() < HUGE, obs, 0.0))
        self.register_buffer("discounted_return", torch.zeros(num_envs, dtype=torch.float64))
        self.register_buffer("episode", torch.zeros(2, num_envs, dtype=torch.float64))  # return and length so far
        self.register_buffer("broken_episodes", torch.zeros(1, dtype=torch.int64))

    def flatten(self, obs) -> torch.Tensor:
        """A copy as (N, obs_dim), since simulators use their buffers again."""
        return torch.cat([torch.tensor(leaf, dtype=torch.float64).flatten(1) for leaf in tree_leaves(obs)], dim=1)

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Actions (N, D) in the box to rewards, terminated, done, all (N,), and k final observations (k, obs_dim)."""
        action = action.cpu().numpy().astype(self.space.dtype).clip(self.low, self.high)
        obs, *results, _ = self.envs.step(action.reshape(-1, *self.space.shape))
        obs = self.flatten(obs).to(self.obs)
        reward, terminated, truncated = (torch.tensor(x).to(self.obs.device) for x in results)
        reward, done = reward.double(), terminated | truncated
        broken = ~((obs.abs() < HUGE).all(-1) & (reward.abs() < HUGE))  # a NaN is broken, too
        if broken.any():
            where = broken.nonzero().flatten().tolist()
            tqdm.write(f"Environment {where} of {self.env_id}: a reward or observation is not finite; its episode ends")
            self.broken_episodes += len(where)
            obs[broken], reward[broken], terminated[broken], done[broken] = self.obs[broken], 0.0, False, True
        self.episode.add_(torch.stack((reward, torch.ones_like(reward))))
        final_obs = obs[done]
        if done.any():
            self.episodes += self.episode[:, done].T.tolist()
            self.episode[:, done] = 0.0
            first_obs = self.flatten(self.reset(done.cpu().numpy())).to(obs)
            obs[done] = first_obs[done] if len(first_obs) == len(done) else first_obs
        self.obs = torch.where(obs.abs() < HUGE, obs, 0.0)  # a first observation can be broken, too
        return reward, terminated, done, final_obs

    def get_extra_state(self) -> list:
        """All that the simulators' next steps depend on, known of Gymnasium's own MuJoCo tasks in this process."""
        states = []
        for env in getattr(self.envs, "envs", []):
            task, spec = env.unwrapped, gym.spec(env.spec.id)
            if type(task).__module__.startswith("gymnasium.envs.mujoco.") and not spec.additional_wrappers:
                data = torch.frombuffer(bytearray(zlib.compress(task.data.__getstate__(), 1)), dtype=torch.uint8)
                random = json.dumps(task.np_random.bit_generator.state)
                states.append((data, random, env.get_wrapper_attr("_elapsed_steps")))
        return states

    def set_extra_state(self, states: list) -> None:
        for env, (data, random, elapsed_steps) in zip(self.envs.envs, states):
            task = env.unwrapped
            task.data = type(task.data).__new__(type(task.data))
            task.data.__setstate__(zlib.decompress(data.numpy().tobytes()))
            task.np_random.bit_generator.state = json.loads(random)
            env.set_wrapper_attr("_elapsed_steps", elapsed_steps)


def make_envs(args: Args, num_envs: int, seed: int, film: Optional[Path] = None) -> Environments:
    """`num_envs` environments, filmed as `film`-episode-0.mp4, ... Raises BadInput with why they do not work."""
    try:
        if args.envpool:
            import envpool

            kwargs = {"num_threads": min(num_envs, len(os.sched_getaffinity(0))), **args.env_kwargs}
            if args.env_id in gym.registry and "post_constraint" in envpool.make_spec(args.env_id).config._fields:
                kwargs.setdefault("post_constraint", True)  # or Humanoid-v4's contact forces stay 0
            envs = envpool.make_gymnasium(args.env_id, num_envs=num_envs, seed=seed, **kwargs)
            if film:
                print("EnvPool's environments are not filmed: only Gymnasium's are.")
            space, reset = envs.action_space, lambda mask: envs.reset(np.flatnonzero(mask).astype(np.int32))[0]
        else:
            kwargs, wrappers = dict(args.env_kwargs), []
            if args.evaluate:  # or an episode without end would never be counted
                wrappers.append(lambda env: env if env.spec.max_episode_steps else gym.wrappers.TimeLimit(env, 10_000))
            if film:
                os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"  # off-screen, without a display
                kwargs["render_mode"] = "rgb_array"
                record = partial(gym.wrappers.RecordVideo, episode_trigger=lambda episode: episode < args.eval_episodes)
                wrappers.append(partial(record, video_folder=str(film.parent), name_prefix=film.name))
            mode = "async" if args.async_envs else "sync"
            options = {"copy": False, "autoreset_mode": gym.vector.AutoresetMode.DISABLED}
            envs = gym.make_vec(args.env_id, num_envs, mode, options, wrappers, disable_env_checker=True, **kwargs)
            envs._add_info = lambda infos, info, index: infos  # nobody reads them, and merging them is slow
            envs.reset(seed=seed)
            space, reset = envs.single_action_space, lambda mask: envs.reset(options={"reset_mask": mask})[0]
        parts = envs, num_envs, reset, space, args.env_id
        if not film:  # a step, so that what fails here has written nothing
            probe = Environments(*parts)
            probe.step(torch.zeros(num_envs, math.prod(space.shape)))
            if probe.broken_episodes == num_envs:
                raise BadInput("its first step gives no finite numbers")
        return Environments(*parts)
    except Exception as error:  # whatever an environment raises, its user wants the sentence, not the stack
        hint = " (films need MUJOCO_GL=egl and, on Debian, libegl1)" if film else ""
        raise BadInput(f"--env-id {args.env_id} does not work: {str(error) or type(error).__name__}{hint}") from error


def compile_functions(agent: Agent, args: Args, raw_obs: torch.Tensor, act, gradient_fn):
    """`act` and `gradient_fn` compiled; as they are, with one line, where no C++ compiler works.
    `torch.compile` makes the same kernels, but between two steps of a simulator its Python costs more than they do."""
    state = {**dict(agent.named_parameters()), **dict(agent.named_buffers())}
    tensors = [x.detach() for x in state.values()]  # inputs of what is compiled, at every call
    options = {"config_patches": {"cpp_wrapper": True, "fallback_random": True}}  # the random numbers of eager mode

    def compiled(function, *inputs):
        def pure(*everything):
            given = {name: x.detach().requires_grad_(state[name].requires_grad) for name, x in zip(state, everything)}
            with torch.nn.utils.stateless._reparametrize_module(agent, given):
                return tuple(function(*everything[len(state) :]))

        graph = make_fx(pure)(*tensors, *inputs)
        call = torch._inductor.standalone_compile(graph, [*tensors, *inputs], options=options)
        return lambda *inputs: call(*tensors, *inputs)

    try:
        with torch.no_grad():
            obs, actions = act(raw_obs[:1].expand(args.num_envs * args.num_steps // args.num_minibatches, -1))[:2]
            compiled_act = compiled(act, raw_obs)
        others = torch.randn(4, len(obs)).to(obs).unbind()  # not one tensor four times, which would be taken for one
        return compiled_act, compiled(gradient_fn, obs, actions, *others)
    except Exception as error:  # the compiler's errors change with its versions; none may cost a run
        print(f"PyTorch's compiler does not work here ({type(error).__name__}): going on eagerly, slower.")
        return act, gradient_fn


def open_run(args: Args, run_dir: Path, global_step: int) -> tuple:
    """The run's log, on W&B too with --track, and the lock that keeps a second process away."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock").acquire(timeout=0)
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
        checkpoint |= {"args": Args(**checkpoint["args"]), "run_dir": file.parent}
        if agent:
            agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # torch.load has no error class of its own
        raise BadInput(f"{str(path)!r} holds no checkpoint that fits: {str(error) or type(error).__name__}") from error
    return checkpoint


def evaluate(checkpoint: str | Path, policy_class: type = FlowPolicy, **flags) -> list[float]:
    """Play a trained policy with its statistics frozen; print and return the undiscounted returns of its episodes.
    `flags` are fields of `Args` other than the run's: `eval_episodes`, `temperature`, `seed`, `capture_video`, ... The
    same seed gives the same returns. Raises BadInput for a checkpoint that cannot be played."""
    state = load_checkpoint(checkpoint)
    args = dataclasses.replace(state["args"], **{"capture_video": False, "evaluate": str(checkpoint), **flags})
    args.envpool = args.envpool and args.env_id not in gym.registry  # Gymnasium has films and the exact physics
    film = state["run_dir"] / "videos" / f"step{state['global_step']}-temperature{args.temperature:g}"
    envs, seen = make_envs(args, 1, args.seed, film if args.capture_video else None), []
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        tqdm(total=args.eval_episodes, unit="episode", **BAR) as bar,
    ):
        agent = Agent(args, policy_class, envs)
        load_checkpoint(checkpoint, agent)
        torch.manual_seed(args.seed)
        while len(envs.episodes) < args.eval_episodes:
            seen.append(envs.obs[:, agent.policy_obs])
            envs.step(agent.act(envs.obs, args.temperature)[-1])
            bar.set_postfix_str(f"step {envs.episode[1].item():.0f}", refresh=False)
            bar.update(len(envs.episodes) - bar.n)
    envs.envs.close()
    returns = [episodic_return for episodic_return, _ in envs.episodes]
    print(f"{len(returns)} episodes, temperature {args.temperature:g}: {np.mean(returns):.1f} ± {np.std(returns):.1f}")
    if args.export_onnx:
        agent, obs, shapes = agent.float(), torch.cat(seen[:256]).float(), {"obs": {0: torch.export.Dim("batch")}}
        names = {"input_names": ["obs"], "output_names": ["continuous_actions"]}  # as Playground's controllers say
        program = torch.onnx.export(agent, (obs[:2],), **names, dynamic_shapes=shapes, opset_version=18, dynamo=True)
        program.model.ir_version = 9  # with opset 18 it is what robots' runtimes read, back to onnxruntime 1.16
        torch.testing.assert_close(program(obs)[0], agent(obs), rtol=1e-5, atol=1e-5)  # or it must not reach a robot
        about = envs.envs.spec.config._asdict() if args.envpool else {}  # of a robot: ctrl_dt, action_scale, ...
        about = {name: str(value) for name, value in about.items() if isinstance(value, float)}
        program.model.metadata_props.update({"env_id": args.env_id, **about})
        program.save(args.export_onnx, external_data=False)
        print(f"Wrote {args.export_onnx}, raw observations in and actions in the environment's units out.")
    return returns


def main(policy_class: type = FlowPolicy, defaults: Optional[Args] = None) -> None:
    """The command line: train, or resume or evaluate a run, whose own arguments then are the flags' defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", "--evaluate", dest="run")
    run = parser.parse_known_args()[0].run
    try:
        if run is not None:
            defaults = dataclasses.replace(load_checkpoint(run)["args"], resume=None, capture_video=False)
        args = tyro.cli(Args, default=defaults or Args(), description=__doc__.split("\n")[0])
        if args.evaluate is not None:
            evaluate(args.evaluate, policy_class, **dataclasses.asdict(args))
        else:
            run_dir = train(args, policy_class)["run_dir"]
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"Play it: python {sys.argv[0]} --evaluate {run_dir!r} [--export-onnx policy.onnx]")
                if args.capture_video:
                    evaluate(run_dir, policy_class, capture_video=True)
    except (BadInput, FloatingPointError, OSError, AssertionError) as error:
        tqdm.write("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)


if __name__ == "__main__":
    main()
