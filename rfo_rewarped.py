"""RFO on Rewarped: a flow policy that is trained by differentiating its return through the simulator.

Paper: "Reparameterization Flow Policy Optimization" (Zhong et al., 2026).
  1. To act, draw x_0 ~ N(0, I) and let it flow along a learned velocity field: x_{k+1} = x_k + v(x_k, k/K | o) / K.
     The action is tanh(x_K). Such a policy can have many modes, but its density is expensive to compute.
  2. It is not needed: the simulator is differentiable, and so is the flow. The return of a short rollout, with a
     critic's value of its last state, is differentiated through both, down to the policy's parameters (as in SHAC).
  3. Left alone, the flow forgets how to explore, and training breaks. Two flow-matching losses on the same field
     prevent it: one pulls it to the actions of the last two rollouts (stability), one to uniform ones (exploration).
Run:  python rfo_rewarped.py --env-id Cartpole   (needs: pip install -r requirements/rewarped.txt)
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import torch
import tyro
from filelock import FileLock
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

HUGE = 1e10  # a number that no simulator means
SUITES = "dflex", "gradsim", "softgym", "plasticinelab", "dexdeform", "isaacgymenvs", "warp_examples"  # of Rewarped
BAR = {"mininterval": 0.1 if sys.stderr.isatty() else 30, "unit_scale": True}  # in a log, a line every half minute
Json = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


class BadInput(Exception):
    """What was asked for cannot be done; the message says why in one line."""


@dataclass(config={"extra": "forbid", "allow_inf_nan": False})
class Args:
    env_id: str = "Cartpole"  # Rewarped's class of an environment (Ant, Hopper, Jumper, ...), or `module:Class`
    env_kwargs: Json = dataclasses.field(default_factory=dict)  # arguments of the environment
    exp_name: str = "rfo_rewarped"  # name of this experiment, a part of the run's name
    seed: NonNegativeInt = 1  # seed of networks, noise, minibatches and environments
    total_timesteps: PositiveInt = 1_000_000  # environment steps to train for, over all environments
    cuda: bool = False  # simulate and train on a GPU
    torch_threads: PositiveInt = 1  # PyTorch's threads; more than one slows small networks down
    runs_dir: str = "runs"  # folder that receives one folder per run
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT and WANDB_ENTITY say where
    checkpoint_interval: PositiveInt = 50  # iterations between checkpoints; the last iteration always writes one
    resume: Optional[str] = None  # run folder to continue; other flags override the run's own
    evaluate: Optional[str] = None  # run folder or checkpoint to play instead of training
    eval_episodes: PositiveInt = 16  # episodes that --evaluate plays, all at once
    temperature: NonNegativeFloat = 0.0  # factor on the noise x_0 in --evaluate; 0 is the deterministic policy
    export_onnx: Optional[str] = None  # file that --evaluate writes the deterministic policy to
    learning_rate: PositiveFloat = 5e-4  # learning rate of AdamW at the start
    final_learning_rate: PositiveFloat = 1e-5  # learning rate at the end; between them it falls linearly
    num_envs: PositiveInt = 64  # parallel environments (N)
    horizon: PositiveInt = 32  # steps of each environment in one rollout, through which gradients flow (H)
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99  # discount factor
    td_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95  # lambda of the critics' TD(lambda) targets
    critic_epochs: PositiveInt = 16  # the critics' epochs over each rollout
    num_minibatches: PositiveInt = 4  # the critics' minibatches per epoch
    max_grad_norm: PositiveFloat = 0.5  # norm to which gradients are clipped
    reward_scale: PositiveFloat = 1.0  # factor on the rewards that are trained on
    flow_steps: PositiveInt = 4  # Euler steps from noise to action (K)
    action_chunk: PositiveInt = 1  # actions that are drawn at once and played in order (h)
    past_coef: NonNegativeFloat = 0.2  # coefficient of flow matching to the actions of the last two rollouts
    uniform_coef: NonNegativeFloat = 0.2  # coefficient of flow matching to uniform actions

    def __post_init__(self):
        if self.horizon % self.action_chunk:
            raise ValueError(f"--action-chunk is {self.action_chunk}, allowed is a divisor of --horizon {self.horizon}")
        if self.num_envs * self.horizon % self.num_minibatches:
            raise ValueError(f"--num-minibatches is {self.num_minibatches}, allowed is a divisor of num_envs * horizon")
        if self.total_timesteps < self.num_envs * self.horizon:
            raise ValueError(f"--total-timesteps is {self.total_timesteps}, allowed is at least num_envs * horizon")
        if self.export_onnx and (not self.evaluate or self.temperature > 0):
            raise ValueError("--export-onnx needs --evaluate RUN, and --temperature 0: the file holds no noise")


class FlowPolicy(nn.Module):
    """A policy that integrates an ordinary differential equation from noise to an action, in `flow_steps` (K) Euler
    steps. It draws `action_chunk` (h) actions of `action_dim` (D) numbers at once. To use it elsewhere, copy it with
    `mlp` below."""

    def __init__(self, obs_dim: int, action_dim: int, flow_steps: int = 4, action_chunk: int = 1):
        super().__init__()
        self.flow_steps, self.shape = flow_steps, (action_chunk, action_dim)
        latent_dim = action_chunk * action_dim
        self.field = mlp(latent_dim + 1 + obs_dim, latent_dim, gain=0.01)  # small: at first x_K is nearly the noise

    def velocity(self, x: torch.Tensor, u: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """v(x, u | o) at flow time u in [0, 1]. (B, h * D), (B, 1), (B, obs_dim) -> (B, h * D)."""
        return self.field(torch.cat((x, u, obs), dim=-1))

    def sample(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw actions, differentiably. (B, obs_dim) -> actions in [-1, 1] (B, h, D), and x_K (B, h * D), which tanh
        makes them of. `temperature` multiplies the noise x_0; 0 is the deterministic policy."""
        x = obs.new_zeros(*obs.shape[:-1], math.prod(self.shape))
        if temperature > 0:
            x = temperature * torch.randn_like(x)
        for k in range(self.flow_steps):
            u = torch.full_like(x[..., :1], k / self.flow_steps)
            x = x + self.velocity(x, u, obs) / self.flow_steps
        return torch.tanh(x).unflatten(-1, self.shape), x

    def flow_matching_loss(self, obs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Conditional flow matching: how far the field is from carrying noise to the latents `x` (B, h * D) in straight
        lines, E ||v((1 - u) eps + u x, u | o) - (x - eps)||^2 per dimension, so that coefficients fit every robot."""
        u, eps = torch.rand_like(x[..., :1]), torch.randn_like(x)
        return (self.velocity((1 - u) * eps + u * x, u, obs) - (x - eps)).square().mean()


def mlp(in_dim: int, out_dim: int, gain: float = 1.0) -> nn.Sequential:
    """A network of (400, 200, 100) hidden units with LayerNorm and SiLU, the last layer scaled by `gain`."""
    layers = []
    for width in (400, 200, 100):
        layers += [nn.Linear(in_dim, width), nn.LayerNorm(width), nn.SiLU()]
        in_dim = width
    last = nn.Linear(in_dim, out_dim)
    nn.init.orthogonal_(last.weight, gain)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class Critic(nn.Module):
    """Two value functions, (B, obs_dim) -> (B, 2). Their mean bootstraps the actor."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.values = nn.ModuleList(mlp(obs_dim, 1) for _ in range(2))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.cat([value(obs) for value in self.values], dim=-1)


def collect_rollout(agent, envs, args: Args) -> dict[str, torch.Tensor]:
    """Play H steps of N environments and keep the graph: what is returned can be differentiated down to the policy.
    Normalized observations `obs` (T, N, obs_dim); `rewards`, `next_values` of the states that really followed,
    `terminated` and `done`, (T, N); and of each decision its observation and latents, `decision_obs` and `latents`."""
    envs.detach()  # the states enter the graph anew
    steps, decisions, plan = [], [], None
    for _ in range(args.horizon):
        obs = agent.normalize(envs.obs)
        action, plan, due, latents = agent.act(obs, plan, envs.started)
        if due.any():
            decisions.append((obs[due].detach(), latents[due].detach()))
        reward, terminated, done, next_obs = envs.step(action)
        steps.append((obs, agent.normalize(next_obs), args.reward_scale * reward, terminated, done))
    names = "obs next_obs rewards terminated done".split()
    rollout = {name: torch.stack(column) for name, column in zip(names, zip(*steps))}
    rollout["next_values"] = agent.critic(rollout.pop("next_obs")).mean(-1)
    rollout["decision_obs"], rollout["latents"] = (torch.cat(column) for column in zip(*decisions))
    return rollout


def discounted_return(rewards, next_values, terminated, done, gamma: float) -> torch.Tensor:
    """What each environment's rollout is worth: J = sum_t gamma^t r_t + gamma^H V(s_H). All (T, N) -> (N,). At an
    episode's end within the rollout gamma^t starts anew, and V bootstraps a time limit, but no termination."""
    discounts = torch.ones_like(rewards)
    for t in range(1, len(rewards)):
        discounts[t] = torch.where(done[t - 1], 1.0, gamma * discounts[t - 1])
    ends = done.clone()
    ends[-1] = True
    bootstrap = torch.where(ends & ~terminated, next_values, 0.0)
    return (discounts * (rewards + gamma * bootstrap)).sum(0)


def actor_loss(agent, args: Args, rollout: dict[str, torch.Tensor], past: list) -> tuple[torch.Tensor, dict]:
    """L = -J / (N H) + c_past CFM(latents of the last two rollouts) + c_uniform CFM(atanh of uniform actions), and its
    parts to be logged. `past` holds (observations, latents) of up to two earlier rollouts."""
    steps = (rollout[name] for name in ("rewards", "next_values", "terminated", "done"))
    returns = discounted_return(*steps, args.gamma)
    loss = -returns.mean() / args.horizon
    parts = {"losses/actor_loss": loss}
    if args.past_coef > 0 and past:
        obs, latents = (torch.cat(column) for column in zip(*past))
        parts["losses/flow_matching_past"] = agent.policy.flow_matching_loss(obs, latents)
        loss = loss + args.past_coef * parts["losses/flow_matching_past"]
    if args.uniform_coef > 0:
        uniform = torch.empty_like(rollout["latents"]).uniform_(-1.0, 1.0)
        parts["losses/flow_matching_uniform"] = agent.policy.flow_matching_loss(
            rollout["decision_obs"],
            torch.atanh(0.999 * uniform),  # atanh(1) is infinite
        )
        loss = loss + args.uniform_coef * parts["losses/flow_matching_uniform"]
    return loss, {name: part.item() for name, part in parts.items()}


def td_lambda_targets(rewards, next_values, terminated, done, gamma: float, td_lambda: float) -> torch.Tensor:
    """G_t = r_t + gamma ((1 - lambda) V(s_{t+1}) + lambda G_{t+1}), where V replaces G after an episode's end and is 0
    after a termination (Sutton and Barto, Sec. 12.3). All (T, N)."""
    targets = torch.empty_like(rewards)
    for t in reversed(range(len(rewards))):
        last = t + 1 == len(rewards)
        following = next_values[t] if last else torch.lerp(next_values[t], targets[t + 1], td_lambda)
        following = torch.where(done[t], next_values[t], following)
        targets[t] = rewards[t] + gamma * torch.where(terminated[t], 0.0, following)
    return targets


def critic_update(agent, optimizer, args: Args, rollout: dict[str, torch.Tensor]) -> dict[str, float]:
    """Regress both value functions on the same TD(lambda) targets. Returns what is logged."""
    steps = (rollout[name].detach() for name in ("rewards", "next_values", "terminated", "done"))
    targets = td_lambda_targets(*steps, args.gamma, args.td_lambda).flatten()
    obs, losses = rollout["obs"].detach().flatten(0, 1), []
    for _ in range(args.critic_epochs):
        for rows in torch.randperm(len(obs), device=obs.device).chunk(args.num_minibatches):
            loss = (agent.critic(obs[rows]) - targets[rows, None]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    explained = 1 - losses[-1] / (targets.var() + 1e-8)
    return {"losses/value_loss": torch.stack(losses).mean().item(), "losses/explained_variance": explained.item()}


def train(args: Args, policy_class: type = FlowPolicy) -> dict:
    """The whole algorithm with logging and checkpoints. Returns the last metrics, `run_dir` and `episodic_return` among
    them. `policy_class(obs_dim, action_dim)` is a module with `sample`, and `flow_matching_loss` where its coefficients
    are not 0; what else it names, `args` gives it. Raises BadInput."""
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    new = {"run_dir": Path(args.runs_dir, name), "global_step": 0, "returns": [], "past": [], "dropped": 0}
    checkpoint = load_checkpoint(args.resume) if args.resume else new
    run_dir, global_step, returns, past, dropped = (checkpoint[key] for key in new)
    envs = make_envs(args, args.num_envs)
    agent = Agent(args, policy_class, envs).to(envs.obs.device)
    actor, critic = (
        torch.optim.AdamW(network.parameters(), lr=args.learning_rate, betas=(0.7, 0.95))
        for network in (agent.policy, agent.critic)
    )
    if args.resume:
        load_checkpoint(args.resume, agent)
        actor.load_state_dict(checkpoint["actor"])
        critic.load_state_dict(checkpoint["critic"])
        torch.set_rng_state(checkpoint["random"])
        past = [tuple(x.to(envs.obs.device) for x in data) for data in past]
        print(f"{args.env_id} cannot be continued within its episodes: new ones have started.")
    writer, lock = open_run(args, run_dir, global_step)
    batch_size = args.num_envs * args.horizon
    num_iterations = args.total_timesteps // batch_size
    start_step, start_time, metrics, mean_return = global_step, time.time(), {}, float(np.mean(returns or np.nan))
    bar = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", **BAR)
    for iteration in range(global_step // batch_size, num_iterations):
        done_share = iteration / num_iterations
        learning_rate = args.learning_rate + done_share * (args.final_learning_rate - args.learning_rate)
        for group in actor.param_groups + critic.param_groups:
            group["lr"] = learning_rate
        rollout = collect_rollout(agent, envs, args)
        loss, metrics = actor_loss(agent, args, rollout, past)
        actor.zero_grad()
        loss.backward(inputs=list(agent.policy.parameters()))
        norm = clip_grad_norm_(agent.policy.parameters(), args.max_grad_norm)
        if norm.isfinite():  # one step per rollout: after it, the gradient's states would be another policy's
            actor.step()
            metrics |= critic_update(agent, critic, args, rollout)
            past = [*past, (rollout["decision_obs"], rollout["latents"])][-2:]
            agent.obs_stats.update(envs.seen())
        else:  # contacts can make gradients explode: such a rollout teaches nothing, and may not break what was learned
            dropped += 1
            tqdm.write(f"The gradient of rollout {iteration} is not finite: it is dropped, new episodes start.")
            envs.restart()
        global_step += batch_size
        episodes, envs.episodes = envs.episodes, []
        returns = (returns + [episodic_return for episodic_return, _ in episodes])[-100:]
        mean_return = float(np.mean(returns or np.nan))
        bar.set_postfix_str(f"return {mean_return:.0f}, gradient {norm:.2g}", refresh=False)
        bar.update(batch_size)
        metrics["losses/grad_norm"] = norm.item()
        metrics["flow/saturation"] = (rollout["latents"].tanh().abs() > 0.99).float().mean().item()
        metrics["charts/reward"] = rollout["rewards"].mean().item() / args.reward_scale
        metrics["charts/dropped_rollouts"], metrics["charts/learning_rate"] = dropped, learning_rate
        metrics["charts/SPS"] = int((global_step - start_step) / (time.time() - start_time))
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step)
        for episodic_return, length in episodes:
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", length, global_step)
        if iteration % args.checkpoint_interval == 0 or iteration + 1 == num_iterations:
            state = {"args": dataclasses.asdict(args), "global_step": global_step, "returns": returns}
            state |= {"past": past, "dropped": dropped, "random": torch.get_rng_state()}
            state |= {"agent": agent.state_dict(), "actor": actor.state_dict(), "critic": critic.state_dict()}
            save_checkpoint(run_dir / "checkpoint.pt", state)
    bar.close()
    writer.close()
    lock.release()
    return {**metrics, "run_dir": str(run_dir), "global_step": global_step, "episodic_return": mean_return}


class RunningMeanStd(nn.Module):
    """Mean and variance of a stream, in float64 (Chan et al. 1983). Starts as a weak unit sample."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.full((1,), 1e-4, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))

    def update(self, batch: torch.Tensor) -> None:
        """Take in a batch (B, size)."""
        batch = batch.double()
        total, shift = self.count + len(batch), batch.mean(0) - self.mean
        squares = self.var * self.count + batch.var(0, unbiased=False) * len(batch)
        self.var.copy_((squares + shift.square() * self.count * len(batch) / total) / total)
        self.mean += shift * len(batch) / total
        self.count.copy_(total)


class Agent(nn.Module):
    """Policy, critics and running statistics in one module: whoever saves it saves all that the policy needs."""

    def __init__(self, args: Args, policy_class: type, envs):
        super().__init__()
        obs_dim, options = envs.obs.shape[-1], vars(args)
        named = {name: options[name] for name in inspect.signature(policy_class).parameters if name in options}
        self.policy, self.critic = policy_class(obs_dim, envs.action_dim, **named), Critic(obs_dim)
        self.obs_stats = RunningMeanStd(obs_dim)

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw observations (..., obs_dim) to zero mean and unit variance, clipped to +-10."""
        mean, deviation = self.obs_stats.mean, (self.obs_stats.var + 1e-8).sqrt()
        return ((obs - mean.to(obs)) / deviation.to(obs)).clamp(-10, 10)

    def act(self, obs: torch.Tensor, plan, started: torch.Tensor, temperature: float = 1.0) -> tuple:
        """The next action (N, D) of each environment's plan, and the plans, for the next call. Plans are made where
        there is none (`plan` is None), where one is used up and where an episode has just `started` (N,). Also: where
        this was so, `due` (N,), and the latents (N, h * D) drawn there, None where nothing was due. `obs` (N, obs_dim)
        are normalized; plans are the drawn actions (N, h, D) and how many of each are played (N,)."""
        actions, played = plan or (None, torch.zeros_like(started, dtype=torch.int64))
        due = torch.ones_like(started) if plan is None else started | (played == actions.shape[1])
        latents = None
        if due.any():
            drawn, latents = self.policy.sample(obs, temperature)
            actions = drawn if plan is None else torch.where(due[:, None, None], drawn, actions)
            played = torch.where(due, 0, played)
        action = actions[torch.arange(len(obs), device=obs.device), played]
        return action, (actions, played + 1), due, latents

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """What a robot runs: raw observations (B, obs_dim) to deterministic actions (B, h, D) in [-1, 1]."""
        return self.policy.sample(self.normalize(obs), temperature=0.0)[0]


class Environments:
    """N environments of Rewarped. `step` starts new episodes without cutting the gradient of the other environments,
    and says which observation really followed."""

    def __init__(self, env):
        self.env = env
        env.reset()
        # Rewarped resets within `step`, and that cuts the gradient of every environment, not only of those that start
        # anew. So its own call does nothing, and `step` below resets.
        self.reset_envs, env.reset = env.reset, lambda env_ids: None
        self.obs = self.flatten(env.obs_buf)
        self.action_dim, self.episodes, self.observations = env.num_actions, [], []
        self.started = torch.zeros(env.num_envs, dtype=torch.bool, device=self.obs.device)
        self.episode = torch.zeros(2, env.num_envs, device=self.obs.device)  # return and length so far

    def flatten(self, obs) -> torch.Tensor:
        """(N, obs_dim), of an array or of a dictionary of arrays."""
        return torch.cat([leaf.reshape(self.env.num_envs, -1) for leaf in tree_leaves(obs)], dim=1)

    def detach(self) -> None:
        """Forget how the states came about: gradients do not flow further back than this."""
        self.env.initialize_trajectory()
        self.obs = self.flatten(self.env.obs_buf).detach()

    def restart(self) -> None:
        """New episodes everywhere; those that were running are forgotten."""
        self.detach()
        self.reset_envs(torch.arange(self.env.num_envs, device=self.obs.device))
        self.obs, self.observations = self.flatten(self.env.obs_buf).detach(), []
        self.episode.zero_()

    def seen(self) -> torch.Tensor:
        """All raw observations (B, obs_dim) since the last call."""
        observations, self.observations = torch.cat(self.observations), []
        return observations

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Actions (N, D) to rewards, terminated, done, all (N,), and the observations that followed (N, obs_dim)."""
        self.observations.append(self.obs.detach())
        _, reward, done, info = self.env.step(action)
        next_obs, done = self.flatten(self.env.obs_buf), done.bool()
        terminated = info["terminated"].bool() & ~info["truncated"].bool()  # some tasks call a time limit both
        self.episode += torch.stack((reward.detach(), torch.ones_like(reward)))
        self.obs, self.started = next_obs, done
        if done.any():
            self.episodes += self.episode[:, done].T.tolist()
            self.episode[:, done] = 0.0
            self.reset(done)
        return reward, terminated, done, next_obs

    def reset(self, done: torch.Tensor) -> None:
        """Start new episodes where `done` (N,), and give the other environments their states back, gradient and all."""
        env = self.env
        before = {name: getattr(env.state, name) for name in env.state_tensors_names}
        self.reset_envs(done.nonzero().flatten())
        for name, old in before.items():
            fresh = getattr(env.state, name)
            rows = done.repeat_interleave(len(fresh) // len(done)).view(-1, *[1] * (fresh.ndim - 1))
            env.state.assign(name, torch.where(rows, fresh.detach(), old))
        env.compute_observations()
        self.obs = self.flatten(env.obs_buf)


def make_envs(args: Args, num_envs: int, no_grad: bool = False) -> Environments:
    """`num_envs` environments. Raises BadInput with why they do not work."""
    module, _, name = args.env_id.rpartition(":")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # warp looks, and is right
    try:
        with silence():  # notices of old libraries, and the models
            try:
                import warp

                warp.config.quiet = True
                import rewarped  # noqa: F401  (it changes warp, before the tasks are imported)
            except ImportError as error:
                raise BadInput(f"{error}; pip install -r requirements/rewarped.txt") from error
            found = [importlib.import_module(module)] if module else []
            for suite in () if module else SUITES:
                with contextlib.suppress(ModuleNotFoundError):
                    found.append(importlib.import_module(f"rewarped.envs.{suite}.{name.lower()}"))
            classes = [getattr(module, name) for module in found if hasattr(module, name)]
            if not classes:
                raise BadInput("no such class; Rewarped's own are called Cartpole, Ant, Hopper, Jumper, Humanoid, ...")
            options = {"device": "cuda:0" if args.cuda else "cpu", "no_grad": no_grad, "seed": args.seed}
            return Environments(classes[0](num_envs=num_envs, **options, **args.env_kwargs))
    except Exception as error:  # whatever a simulator raises, its user wants the sentence, not the stack
        raise BadInput(f"--env-id {args.env_id} does not work: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def silence():
    """Nothing is printed, be it by Python or by a library in C; warnings neither."""
    saved, null = [(fd, os.dup(fd)) for fd in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for fd, _ in saved:
            os.dup2(null, fd)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings(action="ignore"):
                yield
    finally:
        for fd, copy in saved:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(null)


def open_run(args: Args, run_dir: Path, global_step: int) -> tuple:
    """The run's log, on W&B too with --track, and the lock that keeps a second process away."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock").acquire(timeout=0).lock
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


@torch.no_grad()
def evaluate(checkpoint: str | Path, policy_class: type = FlowPolicy, **flags) -> list[float]:
    """Play a trained policy with its statistics frozen; print and return the undiscounted returns of its episodes, one
    per environment. `flags` are fields of `Args` other than the run's: `eval_episodes`, `temperature`, `seed`, ... The
    same seed gives the same returns. Raises BadInput for a checkpoint that cannot be played."""
    state = load_checkpoint(checkpoint)
    args = dataclasses.replace(state["args"], **{"evaluate": str(checkpoint), "resume": None, **flags})
    with torch.random.fork_rng(devices=[]), tqdm(total=args.eval_episodes, unit="episode", **BAR) as bar:
        torch.manual_seed(args.seed)
        envs = make_envs(args, args.eval_episodes, no_grad=True)
        agent = Agent(args, policy_class, envs).to(envs.obs.device)
        load_checkpoint(checkpoint, agent)
        torch.manual_seed(args.seed)
        returns, finished, plan = torch.zeros_like(envs.episode[0]), torch.zeros_like(envs.started), None
        while not finished.all():
            action, plan, _, _ = agent.act(agent.normalize(envs.obs), plan, envs.started, args.temperature)
            reward, _, done, _ = envs.step(action)
            returns = torch.where(finished, returns, returns + reward)  # of each environment's first episode
            finished |= done
            bar.set_postfix_str(f"step {envs.episode[1].max().item():.0f}", refresh=False)
            bar.update(int(finished.sum()) - bar.n)
    returns = returns.tolist()
    print(f"{len(returns)} episodes, temperature {args.temperature:g}: {np.mean(returns):.1f} ± {np.std(returns):.1f}")
    if args.export_onnx:
        agent, obs = agent.cpu().float().eval(), envs.seen()[-256:].cpu()
        shapes = {"obs": {0: torch.export.Dim("batch")}}
        names = {"input_names": ["obs"], "output_names": ["continuous_actions"]}
        program = torch.onnx.export(agent, (obs[:2],), **names, dynamic_shapes=shapes, opset_version=18, dynamo=True)
        program.model.ir_version = 9  # with opset 18 it is what robots' runtimes read, back to onnxruntime 1.16
        torch.testing.assert_close(program(obs)[0], agent(obs), rtol=1e-5, atol=1e-5)  # or it must not reach a robot
        program.model.metadata_props["env_id"] = args.env_id
        program.save(args.export_onnx, external_data=False)
        print(f"Wrote {args.export_onnx}, raw observations in and actions in [-1, 1] out.")
    return returns


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
            run_dir = train(args, policy_class)["run_dir"]
            print(f"Play it: python {sys.argv[0]} --evaluate {run_dir!r} [--export-onnx policy.onnx]")
    except (BadInput, OSError, AssertionError) as error:
        tqdm.write("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
