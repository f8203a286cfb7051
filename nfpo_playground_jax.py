"""NFPO on MuJoCo Playground, in JAX: PPO whose policy is a normalizing flow instead of a Gaussian.

Paper: "NFPO: Stabilized Policy Optimization of Normalizing Flow for Robotic Policy Learning" (Shi et al., 2026).

  1. A RealNVP flow f, conditioned on the observation o, maps an action a to a latent z = f(a; o) that is N(0, I).
     The change of variables gives its exact density: log pi(a|o) = log N(z; 0, I) + log|det df/da|.
  2. To act, draw z and run f backwards. PPO needs nothing else from a policy, so the rest of it stays as it is.
  3. Left alone, training inflates the determinant until numbers break. NFPO bounds each log-scale: l * tanh(s) (Eq. 6).
  4. To deploy, run f backwards from z = 0, the mode of the base distribution (Sec. A.6).

Train:     python nfpo_playground_jax.py --env-id Go1JoystickFlatTerrain
Deploy:    python nfpo_playground_jax.py --evaluate runs/RUN --export-onnx policy.onnx
"""

import argparse
import dataclasses
import difflib
import importlib
import json
import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from brax.envs.wrappers.training import VmapWrapper
from brax.training.acme import running_statistics
from filelock import FileLock
from flax import struct
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from mujoco import mjx
from mujoco.rendering.classic import gl_context
from mujoco_playground import registry, wrapper
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from tensorboardX import SummaryWriter
from tqdm import tqdm

HUGE = 1e10  # a number that no simulator means
BAR = {"unit_scale": True, "mininterval": 0.1 if sys.stderr.isatty() else 30}  # a line every half minute in a log
MAX_EVAL_STEPS = 10_000  # of --evaluate, where the time limit is later
LAST_STEP = "AutoResetWrapper_preserve_info"  # what Playground's automatic reset leaves alone in `info`
Fraction = Annotated[float, Field(ge=0, le=1)]
Json = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


@dataclass(config={"extra": "forbid", "allow_inf_nan": False})
class Args:
    env_id: str = "CartpoleBalance"  # name of a Playground environment, or `module:Name` where `module` registers it
    config_overrides: Json = dataclasses.field(default_factory=dict)  # changes to the environment's configuration
    domain_randomization: bool = False  # each environment gets a physics model of its own, from the task's randomizer
    full_reset: bool = False  # start every episode anew; by default at the environment's first state, which is faster
    random_initial_steps: bool = True  # start the first episodes in their middle, so that their ends are spread
    impl: Optional[Literal["jax", "warp"]] = None  # physics; by default warp on an NVIDIA GPU that has it, else jax
    exp_name: str = "nfpo_playground_jax"  # name of this experiment, a part of the run's name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # seed of networks, noise, minibatches and environments
    total_timesteps: PositiveInt = 100_000_000  # environment steps to train for, over all environments and devices
    num_devices: PositiveInt = 1  # devices of each process that share the environments (warp: only the minibatches)
    distributed: bool = False  # one of several processes, found by `jax.distributed` (SLURM, Open MPI, TPUs, ...)
    runs_dir: str = "runs"  # folder that receives one folder per run
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "nfpo"  # Weights & Biases project
    wandb_entity: Optional[str] = None  # Weights & Biases entity (team)
    capture_video: bool = False  # film the episodes of --evaluate, or one after training in a single process
    checkpoint_interval: PositiveInt = 50  # iterations between checkpoints; the last iteration always writes one
    keep_interval: Optional[PositiveInt] = None  # iterations between checkpoints that stay, as kept/STEP
    resume: Optional[str] = None  # run folder to continue; other flags override the run's own
    evaluate: Optional[str] = None  # run folder or kept checkpoint to play instead of training
    eval_episodes: PositiveInt = 10  # episodes that --evaluate plays, all at once
    temperature: NonNegativeFloat = 0.0  # factor on the base's deviation in --evaluate; 0 is the deterministic policy
    export_onnx: Optional[str] = None  # file that --evaluate writes the deterministic policy to

    learning_rate: PositiveFloat = 5e-4  # learning rate of Adam; the paper takes 3e-4 for manipulation
    anneal_lr: bool = False  # lower the learning rate linearly to 0
    desired_kl: Optional[PositiveFloat] = None  # the learning rate follows this KL, as in rsl_rl (PPO-adaptive: 0.01)
    num_envs: PositiveInt = 2048  # parallel environments, over all devices
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
    critic_hidden_dims: tuple[PositiveInt, ...] = (512, 256, 128)  # widths of the critic's hidden layers

    num_flow_layers: PositiveInt = 4  # coupling layers K; fewer than 3 cannot let every dimension act on every other
    hidden_dim: PositiveInt = 256  # width of each coupling network
    hidden_layers: PositiveInt = 1  # hidden layers of each coupling network
    scale_fn: Literal["tanh", "clip", "none", "zero", "asymmetric"] = "tanh"  # bound of the log-scale (Sec. 4)
    scale_bound: PositiveFloat = 0.5  # the bound l of the log-scale, for tanh and clip
    base_std: PositiveFloat = 1.0  # the base distribution's deviation at the start
    learned_base_std: bool = False  # learn the base's deviation; the paper does not
    action_noise: NonNegativeFloat = 0.0  # deviation of noise added to the actions that are trained on (Sec. 5.1)

    def __post_init__(self):
        size = self.num_envs * self.num_steps
        if size % self.num_minibatches or size == self.num_minibatches:
            allowed = f"a divisor of num_envs * num_steps = {size} that leaves two samples or more"
            raise ValueError(f"--num-minibatches is {self.num_minibatches}, allowed is {allowed}")
        if self.total_timesteps < size:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, allowed is at least one batch, {size}")
        if self.export_onnx and (not self.evaluate or self.temperature > 0):
            raise ValueError("--export-onnx needs --evaluate RUN, and --temperature 0: the file holds no noise")


class FlowPolicy(nn.Module):
    """A conditional RealNVP as a policy (Eq. 6, Sec. A.7). To use it elsewhere, copy it with the two definitions below.
    The `num_layers` (K) coupling layers keep an action's even- and odd-indexed dimensions in turn; `scale_fn` and
    `scale_bound` (l) bound their log-scales. The base is N(0, diag(sigma^2)) with sigma = `base_std`, 1 in the paper.
    `init` raises KeyError for an unknown `scale_fn`, ValueError for a `base_std` that is not above 0."""

    obs_dim: int
    action_dim: int
    hidden_dim: int = 64
    num_layers: int = 4
    scale_bound: float = 0.5
    scale_fn: str = "tanh"
    hidden_layers: int = 1
    base_std: float = 1.0
    learned_base_std: bool = False
    activation: Callable = nn.elu

    def setup(self):
        even, odd = np.arange(self.action_dim)[0::2], np.arange(self.action_dim)[1::2]
        self.interleave = np.concatenate((even, odd)).argsort()  # undoes the split
        options = self.hidden_dim, self.hidden_layers, self.scale_fn, self.scale_bound, self.activation
        self.layers = [CouplingLayer(len(even if j % 2 else odd), *options) for j in range(self.num_layers)]
        # The observation is the same in every layer, so its part of the K first matrix products is one product.
        self.obs_encoder = linear(self.num_layers * self.hidden_dim)
        log_std = self.param("base_log_std", lambda _: jnp.full(self.action_dim, math.log(self.base_std)))
        self.base_log_std = log_std if self.learned_base_std else jax.lax.stop_gradient(log_std)

    def log_prob(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        """log pi(a|o) = log N(f(a; o); 0, diag(sigma^2)) + log|det df/da| (Eq. 6). (B, obs_dim), (B, D) -> (B,)."""
        z, log_det = self.forward(obs, action)
        return self.base_log_prob(z) + log_det

    def sample(self, obs: jax.Array, key: jax.Array, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
        """Draw actions (Algorithm 1, lines 4-6). (B, obs_dim) -> actions (B, D), their log-probabilities (B,).
        `temperature` multiplies the base's deviation, but not in the log-probability; 0 is deterministic (Sec. A.6)
        and needs no key."""
        z = jnp.zeros((*obs.shape[:-1], self.action_dim))
        if temperature > 0:
            z = temperature * jnp.exp(self.base_log_std) * jax.random.normal(key, z.shape)
        action, log_det = self.inverse(obs, z)
        return action, self.base_log_prob(z) - log_det

    def base_log_prob(self, z: jax.Array) -> jax.Array:
        """log N(z; 0, diag(sigma^2)). (B, D) -> (B,)."""
        scaled = z * jnp.exp(-self.base_log_std)
        return (-0.5 * (jnp.square(scaled) + math.log(2 * math.pi)) - self.base_log_std).sum(-1)

    def forward(self, obs: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f of the paper: actions (B, D) to latents (B, D) and log|det dz/da| (B,)."""
        kept, other, log_det = action[..., 0::2], action[..., 1::2], 0.0
        for layer, obs_features in zip(self.layers, jnp.split(self.obs_encoder(obs), self.num_layers, axis=-1)):
            log_scale, shift = layer(obs_features, kept)
            other = other * jnp.exp(log_scale) + shift  # Eq. 6
            log_det = log_det + log_scale.sum(-1)  # the Jacobian is triangular
            kept, other = other, kept
        even, odd = (other, kept) if self.num_layers % 2 else (kept, other)
        return jnp.concatenate((even, odd), axis=-1)[..., self.interleave], log_det

    def inverse(self, obs: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f^-1 of the paper, last layer first: latents (B, D) to actions (B, D) and log|det da/dz| (B,)."""
        even, odd, log_det = z[..., 0::2], z[..., 1::2], 0.0
        kept, other = (odd, even) if self.num_layers % 2 else (even, odd)
        all_features = jnp.split(self.obs_encoder(obs), self.num_layers, axis=-1)
        for layer, obs_features in zip(reversed(self.layers), reversed(all_features)):
            kept, other = other, kept
            log_scale, shift = layer(obs_features, kept)
            other = (other - shift) * jnp.exp(-log_scale)
            log_det = log_det - log_scale.sum(-1)
        return jnp.concatenate((kept, other), axis=-1)[..., self.interleave], log_det


class CouplingLayer(nn.Module):
    """The networks s_j and t_j of one coupling layer f_j (Eq. 6): two halves of the output of one network."""

    transformed_dim: int
    hidden_dim: int
    hidden_layers: int
    scale_fn: str
    scale_bound: float
    activation: Callable

    SCALE_FNS = {  # how a log-scale s is bounded: the paper's one trick, and what it is compared with (Sec. 4, Fig. 2)
        "tanh": lambda s, bound: bound * jnp.tanh(s),
        "clip": lambda s, bound: s.clip(-bound, bound),
        "none": lambda s, bound: s,
        "zero": lambda s, bound: jnp.zeros_like(s),  # only shifts, as in NICE
        # Andrade (2024): (2/pi) alpha arctan(s/alpha), with alpha 0.1 for growth and 2 for shrinkage.
        "asymmetric": lambda s, _: 2 / jnp.pi * jnp.where(s < 0, 2.0 * jnp.arctan(s / 2.0), 0.1 * jnp.arctan(s / 0.1)),
    }

    @nn.compact
    def __call__(self, obs_features: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features (B, hidden_dim) and kept part (B, |d|) to bounded log-scale and shift, each (B, D - |d|)."""
        hidden = self.activation(obs_features + linear(self.hidden_dim, bias=False)(kept))  # it is in `obs_encoder`
        for _ in range(self.hidden_layers - 1):
            hidden = self.activation(linear(self.hidden_dim)(hidden))
        output = linear(2 * self.transformed_dim, gain=0.01)(hidden)  # small: at first f_j is nearly the identity
        scale, shift = jnp.split(output, 2, axis=-1)
        log_scale = self.SCALE_FNS[self.scale_fn](scale, self.scale_bound)
        self.sow("intermediates", "log_scale", log_scale)  # for `flow_metrics`; nobody else asks for it
        return log_scale, shift


def linear(out_dim: int, gain: float = 2**0.5, bias: bool = True) -> nn.Dense:
    """A linear layer, orthogonal with zero bias as in CleanRL; an empty one where an action has one dimension."""
    init = nn.initializers.orthogonal(gain)
    return nn.Dense(out_dim, bias, kernel_init=lambda key, size, _: init(key, size) if all(size) else jnp.ones(size))


class Critic(nn.Module):
    """The value function V(o): an ELU network, (B, obs_dim) -> (B,)."""

    hidden_dims: tuple[int, ...] = (512, 256, 128)

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        for width in self.hidden_dims:
            obs = nn.elu(linear(width)(obs))
        return linear(1, gain=1.0)(obs).squeeze(-1)


def collect_rollout(agent: "Agent", envs, args: Args) -> tuple["Agent", tuple, dict[str, jax.Array]]:
    """Algorithm 1, lines 2-9: T steps of N environments. Returns the agent after it, the buffer B, and metrics.

    In B are normalized observations, actions (T, N, D) before the box clips them, and, each (T, N), log-probabilities,
    normalized rewards, values, values of what really followed, terminated and done.
    """

    def step(env_state, key):
        obs = as_dict(env_state.obs)
        action, log_prob, boxed_action = agent.act(obs, key)  # lines 4-6
        env_state = envs.step(env_state, boxed_action)  # line 7
        return env_state, (obs, action, log_prob, env_state.reward, env_state.info[LAST_STEP])

    keys = jax.random.split(jax.random.fold_in(agent.key, 0), args.num_steps)
    env_state, (obs, actions, log_probs, rewards, last) = jax.lax.scan(step, agent.env_state, keys)
    # Observations are normalized as those were that the policy acted on; rewards may use what is new.
    normalized, next_obs = agent.normalize(obs), agent.normalize(last["obs"])
    values, next_values = agent.value(normalized), agent.value(next_obs)
    obs_stats = running_statistics.update(agent.obs_stats, obs)
    return_stats = running_statistics.update(agent.return_stats, last["discounted_return"])
    rewards = (rewards / return_stats.std).clip(-10, 10)
    agent = agent.replace(obs_stats=obs_stats, return_stats=return_stats, env_state=env_state)
    rollout = normalized, actions, log_probs, rewards, values, next_values, last["terminated"], last["done"]
    count = last["counts"].sum()
    metrics = {name: (x * last["counts"]).sum() / count for name, x in last.items() if "/" in name}  # nan if none ended
    metrics |= {"charts/episodes": count, "charts/broken_episodes": last["broken_episodes"][-1].sum()}
    return agent, rollout, metrics


def compute_gae(rewards, values, next_values, terminated, done, gamma: float, gae_lambda: float) -> jax.Array:
    """Generalized advantage estimation (Algorithm 1, line 10; Schulman et al. 2016, Eq. 16). All (T, N).

    `next_values[t]` is the value of the state that really followed, an episode's last one included. `terminated` stops
    the bootstrap: that state had no future. `done` stops the trace: the next row is another episode. A time limit is
    done and not terminated.
    """
    deltas = rewards + gamma * jnp.where(terminated, 0.0, next_values) - values
    decays = gamma * gae_lambda * (1 - done)

    def step(last, now):
        delta, decay = now
        last = delta + decay * last
        return last, last

    return jax.lax.scan(step, jnp.zeros_like(values[0]), (deltas, decays), reverse=True)[1]


def ppo_loss(params, agent, args: Args, key, obs, actions, old_log_probs, advantages, returns, old_values):
    """The function `update` of Algorithm 1, lines 19-23, on a minibatch of (B, ...): the loss, and what it measured."""
    agent = agent.replace(params=params)
    log_ratio = agent.ask_policy("log_prob", obs, actions) - old_log_probs
    ratio = jnp.exp(log_ratio)  # r(theta), line 22
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    clipped_ratio = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantages, clipped_ratio * advantages).mean()  # Eq. 2, line 23

    values = agent.value(obs)
    errors = jnp.square(values - returns)
    if args.clip_vloss:
        clipped_values = old_values + (values - old_values).clip(-args.clip_coef, args.clip_coef)
        errors = jnp.maximum(errors, jnp.square(clipped_values - returns))
    value_loss = 0.5 * errors.mean()

    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef > 0:
        # No closed form: -E[log pi(a)] over samples of the current policy, differentiated through the samples.
        loss = loss + args.ent_coef * agent.ask_policy("sample", obs, key)[1].mean()
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/old_approx_kl": -log_ratio.mean(),
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # Schulman's estimator, joschu.net/blog/kl-approx.html
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


def ppo_update(agent: "Agent", args: Args, rollout: tuple[jax.Array, ...]) -> tuple["Agent", dict]:
    """Algorithm 1, lines 10-17: advantages, N epochs of M minibatches, and what they measured."""
    obs, actions, log_probs, rewards, values, next_values, terminated, done = rollout
    advantages = compute_gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
    returns = advantages + values
    noise_key, shuffle_key, loss_key = jax.random.split(jax.random.fold_in(agent.key, 1), 3)
    if args.action_noise > 0:  # Sec. 5.1; the ratio compares both policies at the same, noisy action
        actions = actions + args.action_noise * jax.random.normal(noise_key, actions.shape)
        log_probs = agent.ask_policy("log_prob", obs, actions)
    batch = obs, actions, log_probs, advantages, returns, values
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    order = jnp.tile(jnp.arange(returns.size), (args.update_epochs, 1))
    order = jax.random.permutation(shuffle_key, order, axis=1, independent=True)  # of each epoch

    def step(carry, now):
        (params, opt_state, learning_rate), (indexes, key) = carry, now
        minibatch = jax.tree.map(lambda x: x[indexes], batch)
        minibatch = jax.lax.with_sharding_constraint(minibatch, PartitionSpec("envs"))  # each device takes a share
        gradient, metrics = jax.grad(ppo_loss, has_aux=True)(params, agent, args, key, *minibatch)
        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(lambda x: x * jnp.minimum(args.max_grad_norm / (norm + 1e-6), 1.0), gradient)
        direction, opt_state = optax.scale_by_adam(eps=1e-5).update(gradient, opt_state)
        if args.desired_kl:  # rsl_rl's rule
            kl = metrics["losses/approx_kl"]
            factor = jnp.where(kl > 2 * args.desired_kl, 1 / 1.5, jnp.where(kl < args.desired_kl / 2, 1.5, 1.0))
            learning_rate = (learning_rate * factor).clip(1e-5, 1e-2)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)  # line 24
        return (params, opt_state, learning_rate), {**metrics, "losses/grad_norm": norm}

    order = order.reshape(args.update_epochs * args.num_minibatches, -1)
    carry, keys = (agent.params, agent.opt_state, agent.learning_rate), jax.random.split(loss_key, len(order))
    (params, opt_state, learning_rate), metrics = jax.lax.scan(step, carry, (order, keys))
    metrics = {name: x[-args.num_minibatches :].mean() for name, x in metrics.items()}  # of the last epoch
    metrics["losses/explained_variance"] = 1 - (returns - values).var() / (returns.var() + 1e-8)
    metrics["losses/entropy"] = -rollout[2].mean()  # of the policy that acted, from its own samples
    metrics["charts/learning_rate"] = learning_rate
    return agent.replace(params=params, opt_state=opt_state, learning_rate=learning_rate), metrics


def flow_metrics(agent: "Agent", obs: dict, actions: jax.Array) -> dict[str, jax.Array]:
    """What the paper diagnoses instability with (Fig. 2): log-determinant, size and saturation of the log-scales."""
    _, found = agent.ask_policy("forward", obs, actions, mutable=["intermediates"])
    log_scales = jnp.concatenate(jax.tree.leaves(found), axis=-1)
    return {
        "flow/log_det": log_scales.sum(-1).mean(),
        "flow/scale_abs_mean": jnp.abs(log_scales).mean(),
        "flow/scale_saturation": (jnp.abs(log_scales) > 0.95 * agent.policy.scale_bound).mean(),
        "flow/base_std": jnp.exp(agent.params["policy"]["base_log_std"]).mean(),
    }


def train_iteration(agent: "Agent", envs, args: Args) -> tuple["Agent", dict]:
    """One iteration of Algorithm 1's outer loop, which is compiled as a whole, and its metrics."""
    if args.anneal_lr:
        fraction = 1 - agent.iteration * (args.num_envs * args.num_steps / args.total_timesteps)
        agent = agent.replace(learning_rate=fraction * args.learning_rate)
    agent, rollout, metrics = collect_rollout(agent, envs, args)  # lines 2-9
    agent, losses = ppo_update(agent, args, rollout)  # lines 10-17
    if isinstance(agent.policy, FlowPolicy):  # on every eighth environment, enough for a mean
        metrics |= flow_metrics(agent, *jax.tree.map(lambda x: x[:, ::8], rollout[:2]))
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(agent.params)]).all()
    agent = agent.replace(iteration=agent.iteration + 1, key=jax.random.split(agent.key)[0])
    return agent, {**metrics, **losses, "finite": finite}


def train(args: Args, policy_class: type = FlowPolicy) -> dict:
    """Algorithm 1 with logging and checkpoints. Returns the last metrics, `run_dir` and `episodic_return` among them.

    `policy_class(obs_dim, action_dim)` is a flax module with `sample` and `log_prob` as in `FlowPolicy`; what else it
    asks for by name, `args` gives. Raises BadInput, and FloatingPointError where parameters are no longer finite.
    """
    if args.distributed and not jax.distributed.is_initialized():  # before anything else of JAX
        jax.distributed.initialize()
    unix_time = multihost_utils.broadcast_one_to_all(np.int32(time.time()))  # so that all processes use one folder
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{unix_time}".replace("/", "-").replace(":", "-")
    load = partial(load_checkpoint, args.resume, policy_class)
    checkpoint = load() if args.resume else {}
    run_dir, global_step = checkpoint.get("run_dir", Path(args.runs_dir, name)), checkpoint.get("global_step", 0)
    returns = deque(checkpoint.get("returns", []), maxlen=100)
    envs = make_envs(args)
    new_agent = partial(make_agent, args, policy_class, envs)
    shapes = place(jax.eval_shape(new_agent), args)
    shardings, everywhere = jax.tree.map(lambda x: x.sharding, shapes), shapes.key.sharding
    agent = load(shapes)["agent"] if args.resume else jax.jit(new_agent, out_shardings=shardings)()
    metrics = checkpoint.get("metrics", {})
    writer, lock = open_run(args, run_dir, global_step, metrics)
    iterate = partial(train_iteration, envs=envs, args=args)
    with jax.set_mesh(everywhere.mesh):  # the memory of the agent before an iteration serves the one after it
        iterate = jax.jit(iterate, out_shardings=(shardings, everywhere), donate_argnums=0).lower(shapes).compile()

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    start_step, start_time, mean_return = global_step, time.time(), float(np.mean(returns or np.nan))
    about, is_main = {"policy_class": policy_class.__name__, "args": dataclasses.asdict(args)}, jax.process_index() == 0
    with writer, tqdm(total=num_iterations * batch_size, initial=global_step, disable=not is_main, **BAR) as bar:
        for iteration in range(global_step // batch_size, num_iterations):
            agent, metrics = iterate(agent)
            metrics = {name: x.item() for name, x in jax.device_get(metrics).items()}
            if not metrics.pop("finite"):
                raise FloatingPointError(f"the parameters of {run_dir} are not finite after step {global_step}")
            global_step += batch_size
            returns.extend([metrics["charts/episodic_return"]] * int(metrics["charts/episodes"]))  # each as their mean
            mean_return = float(np.mean(returns or np.nan))
            bar.set_postfix_str(f"return {mean_return:.1f}, KL {metrics['losses/approx_kl']:.3f}", refresh=False)
            bar.update(batch_size)
            metrics = {name: x for name, x in metrics.items() if not np.isnan(x)}
            metrics["charts/SPS"] = int((global_step - start_step) / (time.time() - start_time))
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step)
            keep = args.keep_interval is not None and (iteration + 1) % args.keep_interval == 0
            if keep or iteration % args.checkpoint_interval == 0 or iteration + 1 == num_iterations:
                writer.flush()  # but for what is in its queue, the metrics of this iteration
                for folder, most in (("checkpoint", 1), ("kept", None))[: 1 + keep]:
                    counts = {"global_step": global_step, "returns": list(returns), "metrics": metrics}
                    save_checkpoint(run_dir / folder, most, agent, about | counts)
    return {**metrics, "run_dir": str(run_dir), "global_step": global_step, "episodic_return": mean_return}


@struct.dataclass
class Agent:
    """All that the next iteration depends on and a checkpoint holds. Playground's actions are in [-1, 1] already."""

    params: dict  # of policy and critic
    obs_stats: running_statistics.RunningStatisticsState
    return_stats: running_statistics.RunningStatisticsState  # of the discounted return
    opt_state: Any
    learning_rate: jax.Array  # ()
    env_state: Any  # Playground's, of all environments
    iteration: jax.Array  # ()
    key: jax.Array
    policy: nn.Module = struct.field(pytree_node=False)
    critic: Critic = struct.field(pytree_node=False)

    def normalize(self, obs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Raw observations (..., size) to zero mean and unit variance, clipped to +-10."""
        mean, std = self.obs_stats.mean, self.obs_stats.std
        return {name: ((x - mean[name]) / std[name]).clip(-10, 10) for name, x in obs.items()}

    def act(self, obs: dict, key: Optional[jax.Array], temperature: float = 1.0) -> tuple[jax.Array, ...]:
        """Raw observations (N, size) to actions, log-probabilities and actions in the box."""
        action, log_prob = self.ask_policy("sample", self.normalize(obs), key, temperature)
        return action, log_prob, action.clip(-1, 1)

    def ask_policy(self, method: str, obs: dict, *inputs, **options):
        """The policy's `sample`, `log_prob`, ..., of normalized observations (..., size)."""
        return self.policy.apply({"params": self.params["policy"]}, obs["state"], *inputs, method=method, **options)

    def value(self, obs: dict) -> jax.Array:
        """Normalized observations (..., size) to values (...)."""
        return self.critic.apply({"params": self.params["critic"]}, obs.get("privileged_state", obs["state"]))


def make_agent(args: Args, policy_class: type, envs) -> Agent:
    """New networks, new statistics, new episodes."""
    key, policy_key, critic_key, env_key, steps_key = jax.random.split(jax.random.PRNGKey(args.seed), 5)
    env_state = envs.reset(jax.random.split(env_key, args.num_envs))
    obs, actions = as_dict(env_state.obs), jnp.zeros((args.num_envs, envs.action_size))
    if args.random_initial_steps:
        steps = jax.random.randint(steps_key, args.num_envs, 0, envs.episode_length)
        for name in {"steps", "_steps"} & set(env_state.info):  # the second in tasks that count, too
            env_state.info[name] = steps.astype(env_state.info[name].dtype)
    options = {**vars(args), "num_layers": args.num_flow_layers}
    named = {x.name: options[x.name] for x in dataclasses.fields(policy_class) if x.name in options}
    policy, critic = policy_class(obs["state"].shape[-1], envs.action_size, **named), Critic(args.critic_hidden_dims)
    policy_params = policy.init(policy_key, obs["state"], actions, method="log_prob")["params"]
    critic_params = critic.init(critic_key, obs.get("privileged_state", obs["state"]))["params"]
    params = {"policy": policy_params, "critic": critic_params}
    stats = [running_statistics.init_state(x, 1e-8) for x in (jax.tree.map(lambda x: x[0], obs), jnp.zeros(()))]
    training = optax.scale_by_adam().init(params), jnp.asarray(args.learning_rate), env_state, jnp.zeros((), int), key
    return Agent(params, *stats, *training, policy, critic)


def place(shapes: Agent, args: Args) -> Agent:
    """Spread environments over `num_devices` of each process, and have all else on each of them. Raises BadInput."""
    devices = [x for process in range(jax.process_count()) for x in jax.local_devices(process)[: args.num_devices]]
    shared = args.num_envs, args.num_envs * args.num_steps // args.num_minibatches  # environments and a minibatch
    if args.num_devices > jax.local_device_count() or any(size % len(devices) for size in shared):
        raise BadInput(f"--num-devices is {args.num_devices}, allowed is what this machine has and divides {shared}")
    mesh = jax.sharding.Mesh(np.array(devices), ("envs",))

    def leaf(path, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spread = path[0].name == "env_state" and x.shape[:1] == (args.num_envs,)
        return x.update(sharding=NamedSharding(mesh, PartitionSpec("envs") if spread else PartitionSpec()))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


class EpisodeWrapper(wrapper.Wrapper):
    """Repeats actions, ends episodes at the time limit and sums them up, as Brax's wrapper of this name. It keeps what
    the reset around it replaces: the observation that a step really led to, and how the episode went. A simulation
    whose numbers break ends its own episode and no other. Everything is (N, ...).
    """

    def __init__(self, env, config, gamma: float):
        super().__init__(env)
        self.episode_length, self.gamma = config.episode_length, gamma
        self.action_repeat = config.get("action_repeat", 1)

    def reset(self, rng: jax.Array):
        state, zeros = self.env.reset(rng), jnp.zeros(len(rng))
        names = "terminated done counts discounted_return broken_episodes charts/episodic_return charts/episodic_length"
        last = dict.fromkeys([*names.split(), *(f"episode/{name}" for name in state.metrics)], zeros)
        return state.replace(info={**state.info, "steps": zeros, LAST_STEP: {"obs": as_dict(state.obs), **last}})

    def step(self, state, action: jax.Array):
        before, last, reward = state, state.info[LAST_STEP], 0.0
        for _ in range(self.action_repeat):
            state = self.env.step(state, action)
            reward = reward + state.reward
        numbers = jnp.concatenate((*as_dict(state.obs).values(), reward[:, None]), axis=-1)
        broken = ~(jnp.abs(numbers) < HUGE).all(-1)

        def choose(old: jax.Array, new: jax.Array) -> jax.Array:
            is_shared = new.shape[:1] != broken.shape  # by all environments, as contacts of Warp are
            return new if is_shared else jnp.where(broken.reshape(-1, *[1] * (new.ndim - 1)), old, new)

        # Broken ones go back by a step, with what tasks remember in `info`: by default no reset would ever clean it.
        state = jax.tree.map(choose, before, state)
        reward, terminated, steps = jnp.where(broken, 0.0, reward), state.done, state.info["steps"] + self.action_repeat
        done = jnp.where(broken | (steps >= self.episode_length), 1.0, terminated)
        terms = {f"episode/{name}": jnp.where(jnp.abs(x) < HUGE, x, 0) for name, x in state.metrics.items()}
        terms |= {"charts/episodic_return": reward, "charts/episodic_length": self.action_repeat}
        sums = {name: last[name] * (1 - last["done"]) + x for name, x in terms.items()}
        sums["discounted_return"] = self.gamma * last["discounted_return"] * (1 - last["done"]) + reward
        info = {**state.info, "steps": steps}
        if "_steps" in info:  # a task's own count, which starts anew with the episode
            info["_steps"] = jnp.where(broken, 0, info["_steps"])
        counts = done * (sums["charts/episodic_length"] == steps)  # not the first episodes, begun in their middle
        sums["broken_episodes"] = last["broken_episodes"] + broken
        info[LAST_STEP] = {"obs": as_dict(state.obs), "terminated": terminated, "done": done, "counts": counts, **sums}
        return state.replace(reward=reward, done=done, info=info)


def as_dict(obs) -> dict[str, jax.Array]:
    """An observation as `state` for the policy and, where there is one, `privileged_state` for the critic."""
    obs = obs if isinstance(obs, Mapping) else {"state": obs}
    return {name: obs[name] for name in ("state", "privileged_state") if name in obs}


class BadInput(ValueError):
    """What the user has to change; `main` prints it as one line."""


def make_envs(args: Args):
    """`num_envs` environments as one. Raises BadInput with the reason where they do not work."""
    module, _, name = args.env_id.rpartition(":")
    impl = args.impl or ("warp" if "cuda" in jax.devices()[0].client.platform_version.lower() else "jax")
    try:
        if module:
            importlib.import_module(module)
        elif name not in registry.ALL_ENVS:
            near = difflib.get_close_matches(name, registry.ALL_ENVS, cutoff=0.4) or registry.ALL_ENVS[:3]
            raise BadInput(f"Playground does not have it; nearest names: {', '.join(near)}")
        config = registry.get_default_config(name)
        config.update_from_flattened_dict(args.config_overrides)
        env = registry.load(name, config_overrides={"impl": impl, **args.config_overrides})
        if "pixels" in str(env.observation_size):
            raise BadInput(f"observations are {env.observation_size}, allowed are vectors and no images")
        if jax.process_count() > 1 and env.mjx_model is not None:
            # Playground puts the model on the first process's device, from which no other process can read.
            env._mjx_model = mjx.put_model(env.mj_model, jax.local_devices()[0], impl=impl)
        envs, randomizer = VmapWrapper(env), registry.get_domain_randomizer(name)
        if args.domain_randomization and not randomizer:
            raise BadInput("Playground has no randomizer for --domain-randomization")
        if args.domain_randomization:
            randomizer = partial(randomizer, rng=jax.random.split(jax.random.PRNGKey(args.seed), args.num_envs))
            envs = wrapper.BraxDomainRandomizationVmapWrapper(env, randomizer)
        return wrapper.BraxAutoResetWrapper(EpisodeWrapper(envs, config, args.gamma), full_reset=args.full_reset)
    except Exception as error:  # whatever an environment raises, its user wants the sentence, not the stack
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"--env-id is {args.env_id}, which does not work: {reason}") from error


def open_run(args: Args, run_dir: Path, global_step: int, metrics: dict) -> tuple[SummaryWriter, FileLock]:
    """The run's log, from the last checkpoint and its metrics on, and the lock that keeps a second process away."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / f".lock-{jax.process_index()}", timeout=0)
    lock.acquire()
    print(f"{run_dir}: compiling for {args.num_devices} x {jax.devices()[0].device_kind}.", flush=True)
    config = dataclasses.asdict(args)
    if args.track and jax.process_index() == 0:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run_dir.name}
        wandb.init(**names, resume="allow", sync_tensorboard=True, config=config, allow_val_change=True)
    writer = SummaryWriter(str(run_dir), purge_step=global_step, write_to_disk=jax.process_index() == 0)
    for name, value in metrics.items():
        writer.add_scalar(name, value, global_step)
    writer.add_text("hyperparameters", "\n".join(f"    {name} = {value}" for name, value in config.items()))
    return writer, lock


def save_checkpoint(folder: Path, most: Optional[int], agent: Agent, state: dict) -> None:
    """Write folder/STEP atomically, and leave the newest `most`: whoever reads, whenever, finds a whole checkpoint."""
    options = ocp.CheckpointManagerOptions(max_to_keep=most, enable_async_checkpointing=False)
    arrays = jax.tree.map(lambda x: x if x.size else None, agent)  # orbax refuses empty ones
    items = {"arrays": ocp.args.PyTreeSave(arrays), "state": ocp.args.JsonSave(state)}
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        manager.save(state["global_step"], args=ocp.args.Composite(**items))


def load_checkpoint(path: str | Path, policy_class: type, shapes=None) -> dict:
    """The newest checkpoint of a run folder, or a kept one, runs/RUN/kept/STEP, with its run folder as `run_dir`.

    Those of its arrays that `shapes` names come as `agent`, on the devices it names. Raises BadInput.
    """
    folder = Path(path).absolute()
    try:
        if not folder.name.isdigit():
            folder = folder / "checkpoint" / str(max(ocp.utils.checkpoint_steps(folder / "checkpoint")))
        state = json.loads((folder / "state" / "metadata").read_text())
        if state["policy_class"] != policy_class.__name__:
            raise BadInput(f"it is a run of {state['policy_class']}, and this script trains {policy_class.__name__}")
        if shapes:
            tree = jax.tree.map(lambda x: x if x.size else None, shapes)
            args = ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True)
            arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder / "arrays", args=args)
            state["agent"] = jax.tree.map(lambda x, y: y if x.size else jnp.zeros(x.shape, x.dtype), shapes, arrays)
    except Exception as error:  # orbax raises many kinds of errors for a folder that was cut short or is not its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"{str(path)!r} holds no whole checkpoint that fits: {reason}") from error
    return {**state, "run_dir": folder.parents[1]}


def evaluate(checkpoint: str | Path, policy_class: type = FlowPolicy, **flags) -> list[float]:
    """Play a trained policy with its statistics frozen, all episodes at once; print and return undiscounted returns.

    `flags` are fields of `Args` (`eval_episodes`, `temperature`, `seed`, `config_overrides`, ...) that differ from the
    run's. The same seed gives the same returns. Raises BadInput for what cannot be played.
    """
    state = load_checkpoint(checkpoint, policy_class)
    args = Args(**{**state["args"], "capture_video": False, "evaluate": str(checkpoint), **flags})
    args.num_envs, args.random_initial_steps = args.eval_episodes, False
    envs = make_envs(args)
    agent = jax.jit(partial(make_agent, args, policy_class, envs))()
    wanted = {"params": agent.params, "obs_stats": agent.obs_stats}
    agent = agent.replace(**load_checkpoint(checkpoint, policy_class, wanted)["agent"])
    step = jax.jit(lambda state, key: envs.step(state, agent.act(as_dict(state.obs), key, args.temperature)[-1]))
    num_steps = -(-min(envs.episode_length, MAX_EVAL_STEPS) // envs.action_repeat)
    env_state, seen, frames = agent.env_state, [], []
    returns, alive = np.zeros(args.num_envs), np.ones(args.num_envs, bool)
    for key in tqdm(jax.random.split(agent.key, num_steps), **BAR):
        seen.append(np.asarray(as_dict(env_state.obs)["state"])[alive])
        if args.capture_video:
            names = "qpos", "qvel", "mocap_pos", "mocap_quat", "xfrc_applied"  # what Playground draws from
            frames.append((alive, {name: np.asarray(getattr(env_state.data, name)) for name in names}))
        env_state = step(env_state, key)
        returns += np.where(alive, env_state.reward, 0.0)
        alive = alive & (np.asarray(env_state.done) == 0)
        if not alive.any():
            break
    else:
        print(f"The time limit of {args.env_id} is later: its episodes are cut after {num_steps} steps.")
    mean = f"{returns.mean():.1f} ± {returns.std():.1f}"
    print(f"{len(returns)} episodes of {args.env_id} at temperature {args.temperature:g}: return {mean}", flush=True)
    if args.capture_video:
        film(envs, frames, f"{state['run_dir']}/videos/step{state['global_step']}-temperature{args.temperature:g}")
    if args.export_onnx:
        to_onnx(agent, args.export_onnx, np.concatenate(seen)[:256], args.env_id, envs)
    return returns.tolist()


def film(envs, frames: list, prefix: str) -> None:
    """Write each episode as a film that plays in real time. Prints one line where nothing can be drawn."""
    try:
        if "MUJOCO_GL" not in os.environ and not os.environ.get("DISPLAY"):
            os.environ["MUJOCO_GL"] = "egl"  # off-screen; the default needs a display
            importlib.reload(gl_context)
        from moviepy import ImageSequenceClip

        Path(prefix).parent.mkdir(exist_ok=True)
        for i in range(len(frames[0][0])):
            shown = [{name: x[i] for name, x in frame.items()} for alive, frame in frames if alive[i]]
            shown = [SimpleNamespace(data=SimpleNamespace(**frame)) for frame in shown]
            images = envs.render(shown, camera=0 if envs.mj_model.ncam else None)
            clip = ImageSequenceClip(images, fps=1 / (envs.dt * envs.action_repeat))
            clip.write_videofile(f"{prefix}-episode-{i}.mp4", logger=None)
    except Exception as error:  # the training before it shall not have been in vain
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"No films: {reason}; they need MUJOCO_GL=egl and, on Debian, libegl1", file=sys.stderr)


def to_onnx(agent: Agent, path: str, obs: np.ndarray, env_id: str, envs) -> None:
    """Write the deterministic policy as ONNX, float32: raw `obs` (B, size) to `continuous_actions` (B, D), the names of
    Playground's controllers. Raises AssertionError where the file acts otherwise: it must not reach a robot.
    """
    import jax2onnx
    import onnx
    import onnxruntime

    deployed = jax.jit(lambda obs: agent.act({"state": obs}, None, 0.0)[-1])
    names, shapes = {"input_names": ["obs"], "output_names": ["continuous_actions"]}, [("batch", obs.shape[1])]
    model = jax2onnx.to_onnx(deployed, inputs=shapes, opset=18, **names)
    model.ir_version = 9  # with opset 18 it is what robots' runtimes read, back to onnxruntime 1.16
    env = envs.unwrapped
    scale, pose = env._config.get("action_scale"), getattr(env, "_default_pose", None)  # scaled actions move the pose
    about = {"env_id": env_id, "ctrl_dt": env.dt * envs.action_repeat, "action_scale": scale, "default_pose": pose}
    about = {name: x if isinstance(x, str) else json.dumps(np.asarray(x).tolist()) for name, x in about.items()}
    onnx.helper.set_model_props(model, {name: x for name, x in about.items() if x != "null"})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with jax.default_matmul_precision("highest"):  # a GPU's default rounds float32 to ten bits
        np.testing.assert_allclose(session.run(None, {"obs": obs})[0], deployed(obs), atol=1e-4)
    onnx.save(model, path)
    print(f"Wrote {path}; it acts as the JAX policy on {len(obs)} observations.")


def main(policy_class: type = FlowPolicy, defaults: Optional[Args] = None) -> None:
    """The command line: train, or resume or evaluate a run, whose own arguments then are the flags' defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", "--evaluate", dest="run")
    run = parser.parse_known_args()[0].run
    try:
        if run is not None:
            defaults = Args(**{**load_checkpoint(run, policy_class)["args"], "resume": None})
        args = tyro.cli(Args, default=defaults or Args(), description=__doc__.split("\n")[0])
        if args.evaluate is not None:
            evaluate(args.evaluate, policy_class, **dataclasses.asdict(args))
        else:
            run_dir = train(args, policy_class)["run_dir"]
            if args.capture_video and not args.distributed:
                evaluate(run_dir, policy_class, capture_video=True, eval_episodes=1)
            print(f"Play it: python {sys.argv[0]} --evaluate {shlex.quote(run_dir)} [--export-onnx policy.onnx]")
    except (BadInput, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)


if __name__ == "__main__":
    main()
