"""NFPO on Isaac Gym: PPO whose policy is a normalizing flow instead of a Gaussian, for robots.

Paper: "NFPO: Stabilized Policy Optimization of Normalizing Flow for Robotic Policy Learning" (Shi et al., 2026).

The idea in five lines:
  1. A policy is a density over actions. A RealNVP flow f, conditioned on the observation, maps an action a to a
     latent z = f(a; o) that is N(0, I); the change of variables gives log pi(a|o) = log N(z; 0, I) + log|det df/da|.
  2. To act, draw z and run f backwards. Such a policy can have several modes, and its log-probability is exact.
  3. PPO needs nothing else from a policy, so rollout, GAE, clipped surrogate and critic stay as they are.
  4. Left alone, training inflates the determinant until numbers break. NFPO bounds each scale: l * tanh(s) (Eq. 6).
  5. To deploy, run f backwards from z = 0, the mode of the base distribution (Sec. A.6).

Run:     python nfpo_isaacgym.py --env-id g1
         python nfpo_isaacgym.py --evaluate runs/RUN --export-jit policy.pt
Needs:   Python 3.8, Isaac Gym Preview 4, and Unitree RL Gym or IsaacGymEnvs (the README installs them step by step)
Expect:  a curve in TensorBoard that nobody has published yet: this script was tested against a stand-in for the
         simulator, which is proprietary, and has the paper's hyperparameters.

Sections: Args, environment, flow policy and critic, one function for each step of Algorithm 1, checkpoint, evaluation
and export, training. In a hurry, read "Flow policy and critic" and "Algorithm 1": that is the paper. The rest is what a
training run needs in order not to lose, repeat or hide anything.
"""

from __future__ import annotations

ISAACGYM_ERROR = None
try:
    import isaacgym  # noqa: F401  # raises once PyTorch has been imported, so it comes first
except ImportError as error:
    ISAACGYM_ERROR = error  # said by `import_simulator`; exporting a policy needs no simulator

import argparse
import copy
import dataclasses
import datetime
import difflib
import errno
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Literal, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Args
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    # What to run
    env_id: str = "g1"
    """task of Unitree RL Gym (g1, h1, h1_2, go2) or of any legged_gym; `my_module:task` imports the module that
    registers it first; `isaacgymenvs:Ant` is a task of IsaacGymEnvs"""
    exp_name: str = "nfpo_isaacgym"
    """name of this experiment, a part of the run's name"""
    seed: int = 1
    """seed of networks, noise, minibatches and environments"""
    total_timesteps: int = 200_000_000
    """environment steps to train for, over all environments and processes; Unitree's own PPO takes 983M for g1. Beside
    --resume, a larger number trains longer"""
    runs_dir: str = "runs"
    """folder that receives one folder a run"""

    # Where to run it
    device: str = "cuda:0"
    """device of simulator, networks and batches; under torchrun every process takes the GPU of its own rank"""
    headless: bool = True
    """simulate without the viewer; --no-headless opens it"""
    compile: bool = True
    """compile policy and loss with torch.compile; without a compiler they run eagerly"""
    torch_threads: int = 1
    """PyTorch threads on the CPU"""

    # What to record
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "nfpo"
    """Weights & Biases project"""
    wandb_entity: Optional[str] = None
    """Weights & Biases entity (team)"""
    checkpoint_interval: int = 50
    """iterations between two checkpoints; the first and the last iteration always write one"""
    keep_interval: Optional[int] = None
    """iterations between checkpoints that are kept beside the newest, as checkpoint-STEP.pt; none: no other is kept"""

    # Continue, evaluate, export
    resume: Optional[str] = None
    """run folder to continue, with the run's own arguments"""
    evaluate: Optional[str] = None
    """run folder or checkpoint to play instead of training"""
    eval_episodes: int = 100
    """episodes that --evaluate plays, all at once; 0 plays none, so that an export needs no simulator"""
    temperature: float = 0.0
    """factor on the standard deviation of the base noise in --evaluate; 0 is the deterministic deployment mode"""
    export_jit: Optional[str] = None
    """TorchScript file that --evaluate writes the deterministic policy to, which Unitree's deploy scripts load"""
    export_onnx: Optional[str] = None
    """ONNX file that --evaluate writes the deterministic policy to"""

    # Environment
    num_envs: int = 4096
    """parallel environments in each process"""
    random_initial_steps: bool = True
    """start the first episodes at random step counts, so that not all environments meet the time limit at once"""
    randomize: bool = True
    """legged_gym's observation noise, random friction and pushes; --no-randomize evaluates as Unitree's play.py does.
    IsaacGymEnvs' tasks have theirs in their own configuration"""
    normalize_obs: bool = False
    """normalize observations by running statistics; Unitree's tasks scale them already, most of IsaacGymEnvs' do not"""
    reward_scale: float = 1.0
    """factor on the rewards that are trained on; IsaacGymEnvs' own configurations have 0.01 for Ant and Humanoid"""

    # Algorithm 1: PPO, as for Unitree's robots (Sec. A.3)
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    num_steps: int = 24
    """steps of each environment in one rollout (T in Algorithm 1)"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    desired_kl: Optional[float] = None
    """adapt the learning rate to this KL divergence by rsl_rl's rule (PPO-adaptive of the paper: 0.01)"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 4
    """minibatches an epoch (M in Algorithm 1)"""
    update_epochs: int = 5
    """epochs over each rollout (N in Algorithm 1)"""
    norm_adv: bool = True
    """normalize advantages within a minibatch"""
    clip_coef: float = 0.2
    """clip range of the probability ratio (epsilon in Algorithm 1)"""
    clip_vloss: bool = True
    """clip the value loss as well"""
    ent_coef: float = 0.0
    """entropy coefficient; the entropy is estimated from samples"""
    vf_coef: float = 1.0
    """value-loss coefficient"""
    max_grad_norm: float = 1.0
    """norm to which gradients are clipped, all networks together"""
    critic_hidden_dims: Tuple[int, ...] = (32,)
    """widths of the critic's hidden layers"""

    # Eq. 6: the flow, and the variants of the paper's ablations
    num_flow_layers: int = 4
    """coupling layers K; fewer than 3 cannot let every action dimension act on every other"""
    hidden_dim: int = 64
    """width of each coupling network"""
    hidden_layers: int = 1
    """hidden layers of each coupling network"""
    scale_fn: Literal["tanh", "clip", "none", "zero", "asymmetric"] = "tanh"
    """bound of the log-scale s: l*tanh(s), clamp(s, -l, l), s itself, 0 (only shifts, NICE), or Andrade (2024)"""
    scale_bound: float = 0.5
    """the bound l of the log-scale, for tanh and clip"""
    learned_base_std: bool = False
    """learn the standard deviation of the base distribution (not in the paper)"""
    action_noise: float = 0.0
    """standard deviation of the noise added to the actions that are trained on (Sec. 5.1)"""

    @property
    def batch_size(self) -> int:
        """Transitions in one process's rollout, T * N."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    def num_iterations(self, world_size: int = 1) -> int:
        """Iterations of Algorithm 1's outer loop; a last incomplete batch is not trained on."""
        return self.total_timesteps // (self.batch_size * world_size)


FLOW_FLAGS = ("num_flow_layers", "hidden_dim", "hidden_layers", "scale_fn", "scale_bound", "learned_base_std")
# Flags that may differ between a run and its continuation, or its evaluation: they do not change what is computed.
RESUME_FLAGS = (
    *("resume", "track", "wandb_project_name", "wandb_entity", "runs_dir", "device", "headless", "keep_interval"),
)
EVALUATE_FLAGS = (
    *RESUME_FLAGS,
    *("evaluate", "eval_episodes", "temperature", "export_jit", "export_onnx", "seed", "compile", "randomize"),
)


class BadInput(ValueError):
    """An input that the user has to change; `main` prints it as one line and exits with status 2."""


def check_args(args: Args, policy_class: type, world_size: int = 1) -> None:
    """Raise `BadInput` naming flag, value and what is allowed. Runs before anything is written."""
    at_least_1 = "num_envs num_steps num_minibatches update_epochs num_flow_layers hidden_dim hidden_layers"
    for names, allowed, is_allowed in (
        (at_least_1 + " torch_threads checkpoint_interval", "at least 1", lambda x: x >= 1),
        ("critic_hidden_dims", "one or more widths of at least 1", lambda x: x and min(x) >= 1),
        ("learning_rate scale_bound max_grad_norm reward_scale", "a number above 0", lambda x: 0 < x < float("inf")),
        ("gamma gae_lambda", "between 0 and 1", lambda x: 0 <= x <= 1),
        ("clip_coef", "above 0 and below 1", lambda x: 0 < x < 1),
        ("ent_coef vf_coef action_noise temperature", "a number of at least 0", lambda x: 0 <= x < float("inf")),
        ("desired_kl", "above 0", lambda x: x is None or x > 0),
        ("keep_interval", "at least 1", lambda x: x is None or x >= 1),
        ("seed", "between 0 and 2**31 - 1", lambda x: 0 <= x < 2**31),
    ):
        for name in names.split():
            if not is_allowed(getattr(args, name)):
                raise BadInput(f"{as_flag(name)} is {getattr(args, name)}, allowed is {allowed}")
    if args.batch_size % args.num_minibatches:
        raise BadInput(
            f"--num-minibatches is {args.num_minibatches}, allowed is a divisor of "
            f"num_steps * num_envs = {args.batch_size}"
        )
    if args.norm_adv and args.minibatch_size < 2:
        raise BadInput(
            f"--num-minibatches is {args.num_minibatches}, allowed is at most {args.batch_size // 2}: "
            "advantages are normalized over a minibatch, and one sample has no deviation"
        )
    if args.num_iterations(world_size) < 1:
        raise BadInput(
            f"--total-timesteps is {args.total_timesteps}, allowed is at least one batch: num_steps * num_envs * "
            f"processes = {args.batch_size * world_size}"
        )
    if args.anneal_lr and args.desired_kl is not None:
        raise BadInput("--anneal-lr and --desired-kl are given, allowed is one of them: both set the learning rate")
    exports = {"export_jit": args.export_jit, "export_onnx": args.export_onnx}
    for name, file in exports.items():
        if file is None:
            continue
        if args.evaluate is None:
            raise BadInput(f"{as_flag(name)} needs --evaluate RUN, the run to export")
        if Path(file).is_dir() or not Path(file).absolute().parent.is_dir():
            raise BadInput(f"{as_flag(name)} is {file}, allowed is a file in an existing folder")
        if args.temperature > 0:  # or the returns it prints would not be the file's
            raise BadInput(f"--temperature is {args.temperature}, allowed is 0 with {as_flag(name)}: it holds no noise")
    if args.eval_episodes < (0 if any(exports.values()) else 1):
        raise BadInput(f"--eval-episodes is {args.eval_episodes}, allowed is at least 1, or 0 beside an export")
    if not issubclass(policy_class, FlowPolicy):
        for name in FLOW_FLAGS:
            if getattr(args, name) != getattr(Args, name):
                raise BadInput(f"{as_flag(name)} is {getattr(args, name)}, but {policy_class.__name__} has no flow")
    if args.evaluate is None or args.eval_episodes > 0:
        check_device(args.device)


def check_device(name: str) -> None:
    if re.fullmatch(r"cpu|cuda:\d+", name) is None:
        raise BadInput(f"--device is {name}, allowed is cpu or cuda:0, cuda:1, ...")
    if name != "cpu" and torch.device(name).index >= torch.cuda.device_count():
        raise BadInput(
            f"--device is {name}, but PyTorch finds {torch.cuda.device_count()} GPUs here; --device cpu simulates "
            "legged_gym's tasks on the CPU, which is slow"
        )


def resume_flags(args: Args) -> tuple[str, ...]:
    """Flags that a continued run may change: its length too, unless the learning rate depends on it."""
    return RESUME_FLAGS if args.anneal_lr else (*RESUME_FLAGS, "total_timesteps")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------------------------------------------------------
# Environment
# ----------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a step of N environments gives. The tensors may be the environment's own, which its next step overwrites."""

    obs: torch.Tensor  # (N, obs_dim)
    critic_obs: Optional[torch.Tensor]  # (N, critic_obs_dim), None where the critic sees what the policy sees
    reward: torch.Tensor  # (N,)
    done: torch.Tensor  # (N,) bool
    time_out: torch.Tensor  # (N,) bool, done at the time limit, even if the robot fell in that very step
    terms: dict  # the environment's own: {name: mean over the episodes just reset, or IsaacGymEnvs' scalar of the step}


class LeggedGymEnvs:
    """A task of legged_gym: Unitree RL Gym's, or any other that its task registry knows.

    Environments reset within the step that ends their episode, so the last observation of an episode is never seen.
    """

    resets_in_step = True

    def __init__(self, name: str, num_envs: int, seed: int, device: str, headless: bool, randomize: bool):
        from isaacgym import gymapi
        from legged_gym.utils import class_to_dict, task_registry

        on_gpu = torch.device(device).type == "cuda"
        env_cfg, train_cfg = task_registry.get_cfgs(name)
        train_cfg.seed = seed  # where `make_env` takes its seed from
        if not randomize:
            env_cfg.noise.add_noise = False
            env_cfg.domain_rand.randomize_friction = False
            env_cfg.domain_rand.push_robots = False
        # Without a namespace, `make_env` would parse this script's command line and refuse it.
        settings = argparse.Namespace(
            physics_engine=gymapi.SIM_PHYSX,
            sim_device=device,
            headless=headless,
            num_envs=num_envs,
            use_gpu=on_gpu,
            use_gpu_pipeline=on_gpu,
            subscenes=0,
            num_threads=0,
        )
        self.env, env_cfg = task_registry.make_env(name, settings)
        self.cfg = class_to_dict(env_cfg)
        self.num_envs, self.max_episode_length = num_envs, int(self.env.max_episode_length)
        self.obs_dim, self.action_dim = self.env.num_obs, self.env.num_actions
        self.critic_obs_dim = self.env.num_privileged_obs

    def reset(self) -> tuple:
        """Start new episodes; returns obs and critic_obs as in `Step`."""
        return self.env.reset()

    def randomize_episode_lengths(self) -> None:
        lengths = self.env.episode_length_buf
        self.env.episode_length_buf = torch.randint_like(lengths, high=self.max_episode_length)

    def step(self, action: torch.Tensor) -> Step:
        """Actions (N, action_dim), which the environment clips at +-100 and scales by itself."""
        obs, critic_obs, reward, done, infos = self.env.step(action)
        done = done.bool()
        # `infos` is one dict for ever, whose entries are written only when some environment resets: in all other steps
        # they are old. rsl_rl 1.0.2 reads them all the same.
        time_out = infos["time_outs"].bool() & done if "time_outs" in infos else torch.zeros_like(done)
        return Step(obs, critic_obs, reward, done, time_out, infos.get("episode", {}))

    def state_dict(self) -> dict:
        """What leggedrobotics' legged_gym carries from episode to episode: the ranges that its curriculum of commands
        has reached, and the counter that times it and the pushes. Unitree's fork has both and lets them lie: it calls
        no curriculum, and pushes by the step of the episode. Levels of terrain are not among them: all episodes start
        anew, and with them the levels."""
        found = {x: getattr(self.env, x) for x in ("command_ranges", "common_step_counter") if hasattr(self.env, x)}
        # A curriculum leaves NumPy's numbers, which `load_checkpoint` would refuse.
        return json.loads(json.dumps(found, default=float))

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self.env, name, value)


class IsaacGymEnvs:
    """A task of IsaacGymEnvs.

    Environments reset in the step after the one that ends their episode. So the true last observation is seen, and the
    next step must not be trained on: the policy chose its action for the old episode. Nine tasks then ignore it, the
    others apply it to the fresh state. `import_simulator` refuses the tasks that work otherwise.
    """

    resets_in_step = False

    def __init__(self, name: str, num_envs: int, seed: int, device: str, headless: bool, randomize: bool):
        import isaacgymenvs

        for set_seed in (random.seed, np.random.seed, torch.manual_seed):  # `make` itself does nothing with its seed
            set_seed(seed)
        self.env = isaacgymenvs.make(
            seed=seed,
            task=name,
            num_envs=num_envs,
            sim_device=device,
            rl_device=device,
            graphics_device_id=-1 if headless else int(device.partition(":")[2] or 0),
            headless=headless,
            force_render=not headless,
        )
        self.cfg = self.env.cfg
        self.num_envs, self.max_episode_length = num_envs, int(self.env.max_episode_length)
        self.obs_dim, self.action_dim = self.env.num_obs, self.env.num_acts
        self.critic_obs_dim = self.env.num_states or None

    def reset(self) -> tuple:
        """Start new episodes; returns obs and critic_obs as in `Step`."""
        self.env.reset()  # zeros, with nothing reset yet: the first step does that
        self.env.reset_buf.fill_(1)
        first = self.step(torch.zeros(self.num_envs, self.action_dim, device=self.env.rl_device))
        return first.obs, first.critic_obs

    def randomize_episode_lengths(self) -> None:
        self.env.progress_buf.copy_(torch.randint_like(self.env.progress_buf, high=self.max_episode_length - 1))

    def step(self, action: torch.Tensor) -> Step:
        """Actions (N, action_dim), which the environment clips by itself."""
        obs, reward, done, extras = self.env.step(action)
        done = done.bool()
        time_out = extras["time_outs"].bool() if "time_outs" in extras else torch.zeros_like(done)
        scalars = {name: x for name, x in extras.items() if torch.is_tensor(x) and x.dim() == 0}
        return Step(obs["obs"], obs.get("states"), reward, done, time_out, {**scalars, **extras.get("episode", {})})

    def state_dict(self) -> dict:
        return {"env_state": self.env.get_env_state()}

    def load_state_dict(self, state: dict) -> None:
        if state["env_state"] is not None:
            self.env.set_env_state(state["env_state"])


# Configurations of IsaacGymEnvs that do not work here, by how their names start.
REFUSED_TASKS = {
    ("AnymalTerrain", "HumanoidAMP"): "does not reset like the other tasks of isaacgymenvs, in the step after an "
    "episode's end; for Anymal on terrain take anymal_c_rough of leggedrobotics' legged_gym, in an environment of its "
    "own: Unitree's fork has the same package name and no Anymal",
    ("Factory", "IndustReal"): "isaacgymenvs.make cannot build: while they are made, these tasks read further "
    "configurations, which only IsaacGymEnvs' own train.py finds (its issue 197)",
    ("AllegroHandDextreme",): "gives its observations in a dictionary of parts; the policy needs one vector",
}


def split_env_id(env_id: str) -> tuple:
    """`module:task` to (module, task); the module is empty where none is named."""
    module, _, name = env_id.rpartition(":")
    return module, name


def import_simulator(env_id: str) -> None:
    """Import what builds `env_id`. Raises `BadInput` with what to install, or the nearest names of tasks."""
    if ISAACGYM_ERROR is not None:
        raise BadInput(
            f"--env-id is {env_id}, which needs Isaac Gym ({' '.join(str(ISAACGYM_ERROR).split())}): download "
            "Preview 4 from https://developer.nvidia.com/isaac-gym and `pip install -e isaacgym/python`, on Python 3.8"
        )
    module, name = split_env_id(env_id)
    package, source = "legged_gym", "https://github.com/unitreerobotics/unitree_rl_gym"
    if module == "isaacgymenvs":
        package, source = module, "https://github.com/isaac-sim/IsaacGymEnvs"
    try:
        if package == "legged_gym":
            importlib.import_module("legged_gym.envs")  # registers the tasks
            if module:
                importlib.import_module(module)
            tasks = importlib.import_module("legged_gym.utils").task_registry.task_classes
        else:
            folder = Path(importlib.import_module(package).__file__).parent
            tasks = {file.stem for file in folder.glob("cfg/task/*.yaml")}
    except ImportError as error:
        raise BadInput(
            f"--env-id is {env_id}, which needs {module or package} ({' '.join(str(error).split())}); "
            f"{package} is at {source}, to be cloned and installed with `pip install -e`"
        ) from error
    if package == "isaacgymenvs":
        for starts, reason in REFUSED_TASKS.items():
            if name.startswith(starts):
                raise BadInput(f"--env-id is {env_id}, which {reason}")
            tasks = {task for task in tasks if not task.startswith(starts)}
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.0)
        raise BadInput(f"--env-id is {env_id}, which {package} does not have; nearest names: {', '.join(near)}")


def check_isaacgymenvs(env_id: str, device: str, randomize: bool) -> None:
    """Raise `BadInput` for what `isaacgymenvs.make` would silently do otherwise: its configuration decides."""
    module, name = split_env_id(env_id)
    if module != "isaacgymenvs":
        return
    if not randomize:
        raise BadInput(
            f"--no-randomize is given with {env_id}, whose randomization only `task: randomize:` in IsaacGymEnvs' "
            f"cfg/task/{name}.yaml switches; leave the flag out"
        )
    if device == "cpu":
        raise BadInput(
            f"--device is cpu, allowed is cuda:0, cuda:1, ... with {env_id}: IsaacGymEnvs' cfg/config.yaml keeps the "
            "physics on the GPU"
        )


def make_envs(
    env_id: str, num_envs: int, seed: int, device: str = "cuda:0", headless: bool = True, randomize: bool = True
):
    """The process's environments. A process can make them once: Isaac Gym has one simulation a process."""
    module, name = split_env_id(env_id)
    adapter = IsaacGymEnvs if module == "isaacgymenvs" else LeggedGymEnvs
    return adapter(name, num_envs, seed, device, headless, randomize)


class RunningMeanStd:
    """Mean and variance of a stream, in float64 (Welford's algorithm over batches). Starts as one weak unit sample."""

    def __init__(self, dim: int, device: torch.device):
        like = {"dtype": torch.float64, "device": device}
        self.count = torch.full((), 1e-4, **like)
        self.mean = torch.zeros(dim, **like)
        self.sum_squares = torch.full((dim,), 1e-4, **like)  # of the deviations from the mean

    @property
    def std(self) -> torch.Tensor:
        return (self.sum_squares / self.count + 1e-8).sqrt()

    def update(self, batch: torch.Tensor) -> None:
        """Take in a batch of shape (B, dim)."""
        self.count = self.count + len(batch)
        deviation = batch - self.mean
        self.mean = self.mean + deviation.sum(0) / self.count
        self.sum_squares = self.sum_squares + (deviation * (batch - self.mean)).sum(0)

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations (..., dim) with zero mean and unit variance, clipped to +-10, float32."""
        return ((obs - self.mean) / self.std).clamp(-10, 10).float()

    def state_dict(self) -> dict:
        return {name: value.cpu() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.mean.device))

    def merge_processes(self, before: dict) -> None:
        """Merge what each process has seen since all of them held `before`; afterwards all hold the same again."""
        before = {name: value.to(self.mean.device) for name, value in before.items()}
        # Sums about a common shift simply add up; each process contains `before` once, so all but one are taken off.
        distance = self.mean - before["mean"]
        first, second = self.count * distance, self.sum_squares + self.count * distance**2
        total = torch.cat((self.count.reshape(1), first, second))
        dist.all_reduce(total)
        copies = dist.get_world_size() - 1
        count, first, second = total.split((1, len(first), len(second)))
        self.count = count[0] - copies * before["count"]
        distance = first / self.count
        self.mean = before["mean"] + distance
        self.sum_squares = second - copies * before["sum_squares"] - self.count * distance**2


# ----------------------------------------------------------------------------------------------------------------------
# Flow policy and critic
# ----------------------------------------------------------------------------------------------------------------------


def linear(in_dim: int, out_dim: int, gain: float = 2**0.5, bias: bool = True) -> nn.Linear:
    """A linear layer, orthogonal with zero bias; also the empty ones of one-dimensional actions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = nn.Linear(in_dim, out_dim, bias=bias)
    if layer.weight.numel():
        nn.init.orthogonal_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class CouplingLayer(nn.Module):
    """The networks s_j and t_j of one coupling layer f_j (Eq. 6): two halves of one output.

    The observation's part of the first matrix product is done by `FlowPolicy` for all layers at once and comes in as
    `obs_features`; adding it here makes the sum the product with [observation, kept part], as in the paper.

    Everything in here has the batch last: on large batches, work on halves of six numbers in a row is slow.
    """

    def __init__(self, kept_dim, transformed_dim, hidden_dim, hidden_layers, scale_fn, scale_bound):
        super().__init__()
        self.scale_fn, self.scale_bound = scale_fn, scale_bound
        self.kept = linear(kept_dim, hidden_dim, bias=False)
        self.hidden = nn.ModuleList(linear(hidden_dim, hidden_dim) for _ in range(hidden_layers - 1))
        # A small output: at first every f_j is nearly the identity, and pi nearly N(0, I).
        self.out = linear(hidden_dim, 2 * transformed_dim, gain=0.01)

    def forward(self, obs_features: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (hidden_dim, B) and kept part (|d|, B) to bounded log-scale and shift, each (D - |d|, B)."""
        hidden = nn.functional.elu(obs_features + self.kept.weight @ kept)
        for layer in self.hidden:
            hidden = nn.functional.elu(layer.weight @ hidden + layer.bias[:, None])
        scale, shift = (self.out.weight @ hidden + self.out.bias[:, None]).chunk(2)
        return self.bound(scale), shift

    def bound(self, scale: torch.Tensor) -> torch.Tensor:
        """The paper's one trick, and the variants it is compared with (Sec. 4, Fig. 2)."""
        if self.scale_fn == "tanh":
            return self.scale_bound * torch.tanh(scale)
        if self.scale_fn == "clip":
            return scale.clamp(-self.scale_bound, self.scale_bound)
        if self.scale_fn == "none":
            return scale
        if self.scale_fn == "zero":
            return torch.zeros_like(scale)
        # Andrade (2024): growth is bounded much tighter than shrinkage.
        alpha = torch.full_like(scale, 2.0).masked_fill(scale >= 0, 0.1)
        return (2 / torch.pi) * alpha * torch.atan(scale / alpha)


class FlowPolicy(nn.Module):
    """A conditional RealNVP as a policy (Eq. 6, Sec. A.7). Needs nothing from the rest of this file but the above.

    Args:
        obs_dim: size of an observation.
        action_dim: size D of an action, at least 1.
        hidden_dim, hidden_layers: width and depth of each coupling network.
        num_layers: coupling layers K. Even-indexed dimensions are kept in the first, odd-indexed in the second, ...
        scale_bound: the bound l.
        scale_fn: "tanh" (the paper's), "clip", "none", "zero" or "asymmetric".
        learned_base_std: give the base distribution N(0, diag(sigma^2)) a learned sigma instead of 1.

    Raises:
        ValueError: for an unknown `scale_fn`, a size below 1 or a bound that is not above 0.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dim: int = 64,
        num_layers: int = 4,
        scale_bound: float = 0.5,
        scale_fn: str = "tanh",
        hidden_layers: int = 1,
        learned_base_std: bool = False,
    ):
        super().__init__()
        if scale_fn not in ("tanh", "clip", "none", "zero", "asymmetric"):
            raise ValueError(f"scale_fn is {scale_fn!r}, allowed are tanh, clip, none, zero and asymmetric")
        if min(obs_dim, action_dim, hidden_dim, num_layers, hidden_layers) < 1 or not scale_bound > 0:
            raise ValueError("sizes must be at least 1 and scale_bound above 0")
        self.action_dim, self.num_layers, self.scale_bound = action_dim, num_layers, scale_bound
        even_dim, odd_dim = (action_dim + 1) // 2, action_dim // 2
        self.layers = nn.ModuleList()
        # The observation is the same in every layer, so its part of the K first matrix products is one product.
        self.obs_encoder = linear(obs_dim, num_layers * hidden_dim)
        for obs_weight in self.obs_encoder.weight.data.chunk(num_layers):
            kept_dim, transformed_dim = (even_dim, odd_dim) if len(self.layers) % 2 == 0 else (odd_dim, even_dim)
            layer = CouplingLayer(kept_dim, transformed_dim, hidden_dim, hidden_layers, scale_fn, scale_bound)
            weight = linear(obs_dim + kept_dim, hidden_dim).weight.data
            obs_weight.copy_(weight[:, :obs_dim])
            layer.kept.weight.data.copy_(weight[:, obs_dim:])
            self.layers.append(layer)
        self.base_log_std = nn.Parameter(torch.zeros(action_dim)) if learned_base_std else None
        # Where each dimension lies once the even and the odd half are laid end to end.
        order = torch.arange(action_dim)
        self.register_buffer("interleave", order // 2 + (order % 2) * even_dim, persistent=False)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|o) = log N(f(a; o); 0, I) + sum_j sum l*tanh(s_j) (Eq. 6). (B, obs_dim), (B, D) -> (B,)."""
        z, log_det = self.forward(obs, action)
        return self.base_log_prob(z) + log_det

    def sample(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw actions (Algorithm 1, lines 4-6). (B, obs_dim) -> actions (B, D), log-probabilities (B,).

        `temperature` multiplies the standard deviation of the base noise, and 0 gives the deterministic policy
        (Sec. A.6). The log-probability is always that of the policy at temperature 1.
        """
        z = obs.new_zeros(obs.shape[0], self.action_dim)
        if temperature > 0:
            z = temperature * torch.randn_like(z)
            if self.base_log_std is not None:
                z = z * self.base_log_std.exp()
        action, log_det = self.inverse(obs, z)
        return action.contiguous(), self.base_log_prob(z) - log_det  # a simulator may read the bare memory

    def base_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log N(z; 0, diag(sigma^2)), with sigma = 1 unless it is learned. (B, D) -> (B,)."""
        log_normalizer = 0.5 * self.action_dim * math.log(2 * math.pi)
        if self.base_log_std is not None:
            z = z * (-self.base_log_std).exp()
            log_normalizer = log_normalizer + self.base_log_std.sum()
        return -0.5 * z.square().sum(-1) - log_normalizer

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f of the paper: actions (B, D) to latents (B, D) and log|det dz/da| (B,)."""
        z, log_scales = self.transform(obs, action)
        return z, sum(log_scale.sum(0) for log_scale in log_scales)  # each Jacobian is triangular

    def transform(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """f of the paper, with every layer's log-scale: actions (B, D) to latents (B, D) and K of (D - |d|, B)."""
        kept, other = self.split(action)
        log_scales = []
        for layer, obs_features in zip(self.layers, self.encode(obs)):
            log_scale, shift = layer(obs_features, kept)
            other = other * log_scale.exp() + shift  # Eq. 6
            log_scales.append(log_scale)
            kept, other = other, kept
        even, odd = (other, kept) if self.num_layers % 2 else (kept, other)
        return self.merge(even, odd), log_scales

    def inverse(self, obs: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f^-1 of the paper, last layer first: latents (B, D) to actions (B, D) and log|det da/dz| (B,)."""
        kept, other = self.split(z)
        if self.num_layers % 2:
            kept, other = other, kept
        log_det = 0.0
        for layer, obs_features in zip(reversed(self.layers), reversed(self.encode(obs))):
            kept, other = other, kept
            log_scale, shift = layer(obs_features, kept)
            other = (other - shift) * (-log_scale).exp()
            log_det = log_det - log_scale.sum(0)
        return self.merge(kept, other), log_det

    def encode(self, obs: torch.Tensor) -> tuple:
        """The observation's part of each layer's first matrix product: (B, obs_dim) to K of (hidden_dim, B)."""
        if obs.dim() != 2:
            raise ValueError(f"observations are of shape {tuple(obs.shape)}, allowed is (B, obs_dim)")
        features = self.obs_encoder.weight @ obs.t() + self.obs_encoder.bias[:, None]
        return features.chunk(self.num_layers)

    def split(self, x: torch.Tensor) -> tuple:
        """(B, D) to its even- and its odd-indexed dimensions, (D', B) each."""
        x = x.t().contiguous()
        return x[0::2], x[1::2]

    def merge(self, even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
        """Undo the split: even- and odd-indexed dimensions to (B, D) in their own order."""
        return torch.cat((even, odd))[self.interleave].t()

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor, action: torch.Tensor) -> dict[str, float]:
        """What the paper diagnoses instability with (Fig. 2): log-determinant, size and saturation of the scales."""
        _, log_scales = self.transform(obs, action)
        size = torch.cat(log_scales).abs()
        found = {
            "flow/log_det": sum(log_scale.sum(0) for log_scale in log_scales).mean().item(),
            "flow/scale_abs_mean": size.mean().item(),
        }
        if self.layers[0].scale_fn in ("tanh", "clip"):  # the others are not bounded by l
            found["flow/scale_saturation"] = (size > 0.95 * self.scale_bound).float().mean().item()
        return found


class Critic(nn.Module):
    """The value function V(o): an ELU network, (B, obs_dim) -> (B,)."""

    def __init__(self, obs_dim: int, hidden_dims: tuple[int, ...] = (32,)):
        super().__init__()
        layers = []
        for in_dim, out_dim in zip((obs_dim, *hidden_dims), hidden_dims):
            layers += [linear(in_dim, out_dim), nn.ELU()]
        self.layers = nn.Sequential(*layers, linear(hidden_dims[-1], 1, 1.0))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs).squeeze(-1)


def make_policy(policy_class: type, obs_dim: int, action_dim: int, args: Args) -> nn.Module:
    """`policy_class(obs_dim, action_dim)`; flows also get their flags."""
    if not issubclass(policy_class, FlowPolicy):
        return policy_class(obs_dim, action_dim)
    flags = {name: getattr(args, name) for name in FLOW_FLAGS}
    return policy_class(obs_dim, action_dim, num_layers=flags.pop("num_flow_layers"), **flags)


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ----------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """The buffer B of Algorithm 1: T steps of N environments."""

    obs: torch.Tensor  # (T, N, obs_dim)
    critic_obs: torch.Tensor  # (T, N, critic_obs_dim); where nothing is privileged, `obs` itself
    actions: torch.Tensor  # (T, N, action_dim), as sampled: the environment clips and scales them by itself
    log_probs: torch.Tensor  # (T, N)
    rewards: torch.Tensor  # (T, N), scaled
    values: torch.Tensor  # (T, N)
    next_values: torch.Tensor  # (T, N), of the state that really followed, or what stands in for it
    terminated: torch.Tensor  # (T, N) bool
    done: torch.Tensor  # (T, N) bool, terminated or timed out
    resetting: torch.Tensor  # (T, N) bool, the step only reset the environment: its observation is the old episode's


class EpisodeMeans:
    """Means over the episodes that ended in a rollout, accumulated on the device: only `pop` waits for it."""

    def __init__(self):
        self.totals = {}

    def add(self, count: torch.Tensor, totals: dict) -> None:
        """`count` episodes have ended, over which the values of `totals` add up to scalars."""
        if totals:
            tensors = [x if torch.is_tensor(x) else torch.full((), x, device=count.device) for x in totals.values()]
            row = torch.stack([count.float(), *(x.float().mean() for x in tensors)])
            names = tuple(totals)
            self.totals[names] = self.totals[names] + row if names in self.totals else row

    def pop(self) -> tuple:
        """Number of episodes and {name: mean} since the last call, over all processes."""
        means = {}
        for process in gather_processes({names: row.tolist() for names, row in self.totals.items()}):
            for names, (count, *totals) in process.items():
                for name, total in zip(names, totals):
                    old_count, old_total = means.get(name, (0.0, 0.0))
                    means[name] = (old_count + count, old_total + total)
        self.totals = {}
        episodes = int(means.get("charts/episodic_return", (0, 0))[0])
        return episodes, {name: total / count for name, (count, total) in means.items() if count}


class Collector:
    """What a rollout hands to the next one: environments, their current observation and the running statistics."""

    def __init__(self, envs, args: Args, device: torch.device):
        self.envs, self.normalizes, self.reward_scale = envs, args.normalize_obs, args.reward_scale
        self.is_asymmetric = envs.critic_obs_dim is not None
        self.obs_stats = RunningMeanStd(envs.obs_dim, device)
        self.critic_obs_stats = RunningMeanStd(envs.critic_obs_dim, device) if self.is_asymmetric else self.obs_stats
        self.obs = self.critic_obs = None  # until `reset`
        # Environments whose current observation is an ended episode's.
        self.ended = torch.zeros(envs.num_envs, dtype=torch.bool, device=device)
        self.episode_return = torch.zeros(envs.num_envs, device=device)
        self.episode_length = torch.zeros(envs.num_envs, device=device)
        self.means = EpisodeMeans()

    def reset(self, random_initial_steps: bool) -> None:
        """Start new episodes everywhere."""
        self.observe(*self.envs.reset())
        if random_initial_steps:
            self.envs.randomize_episode_lengths()

    def observe(self, obs: torch.Tensor, critic_obs: Optional[torch.Tensor]) -> None:
        """Take the observations, maybe the environment's own tensors: a rollout copies them before the next step."""
        if self.normalizes:
            self.obs_stats.update(obs)
            obs = self.obs_stats.normalize(obs)
            if self.is_asymmetric:
                self.critic_obs_stats.update(critic_obs)
                critic_obs = self.critic_obs_stats.normalize(critic_obs)
        self.obs, self.critic_obs = obs, critic_obs

    def step(self, action: torch.Tensor) -> tuple:
        """Step all environments. Actions (N, action_dim) to scaled rewards, done, time-outs and resetting, all (N,)."""
        obs, critic_obs, reward, done, time_out, terms = self.envs.step(action)
        resetting, done = self.ended, done.clone()
        ended = done & ~resetting  # Anymal's fallen robot is done again in the step that resets it: no second episode
        self.episode_return += reward.masked_fill(resetting, 0.0)
        self.episode_length += ~resetting
        # legged_gym's terms are means over the episodes that it has reset in this step; scalars of IsaacGymEnvs are
        # logged as they are in those steps.
        num_ended = ended.sum()
        num_reset = num_ended if self.envs.resets_in_step else resetting.sum()
        totals = {
            "charts/episodic_return": self.episode_return.masked_fill(~ended, 0.0).sum(),
            "charts/episodic_length": self.episode_length.masked_fill(~ended, 0.0).sum(),
        }
        self.means.add(num_ended, totals)
        self.means.add(num_reset, {f"episode/{name}": x * num_reset for name, x in terms.items()})
        self.episode_return.masked_fill_(done, 0.0)
        self.episode_length.masked_fill_(done, 0.0)
        self.observe(obs, critic_obs)
        self.ended = torch.zeros_like(done) if self.envs.resets_in_step else done
        return reward * self.reward_scale, done, time_out, resetting

    def stats(self) -> list:
        """The statistics of observations, and of the critic's where it has its own."""
        return [stats.state_dict() for stats in self.all_stats()]

    def all_stats(self) -> list:
        return [self.obs_stats, self.critic_obs_stats] if self.is_asymmetric else [self.obs_stats]

    def state_dict(self) -> dict:
        return {"stats": self.stats(), "envs": self.envs.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for stats, values in zip(self.all_stats(), state["stats"]):
            stats.load_state_dict(values)
        self.envs.load_state_dict(state["envs"])


@torch.no_grad()
def collect_rollout(collector: Collector, sample, critic: nn.Module, num_steps: int) -> Rollout:
    """Algorithm 1, lines 2-9. `sample` is the policy's. Nothing in here waits for the device."""
    num_envs, device = len(collector.obs), collector.obs.device
    per_step = (num_steps, num_envs)
    obs = torch.empty(num_steps + 1, *collector.obs.shape, device=device)
    critic_obs = obs
    if collector.is_asymmetric:
        critic_obs = torch.empty(num_steps + 1, *collector.critic_obs.shape, device=device)
    actions = torch.empty(*per_step, collector.envs.action_dim, device=device)
    log_probs, rewards = torch.empty(per_step, device=device), torch.empty(per_step, device=device)
    done, time_out, resetting = (torch.empty(per_step, dtype=torch.bool, device=device) for _ in range(3))
    for t in range(num_steps + 1):
        obs[t] = collector.obs
        if collector.is_asymmetric:
            critic_obs[t] = collector.critic_obs
        if t < num_steps:
            actions[t], log_probs[t] = sample(obs[t])  # lines 4-6
            rewards[t], done[t], time_out[t], resetting[t] = collector.step(actions[t])  # line 7

    # The critic does not change during a rollout: one batch is faster than T small ones.
    values = critic(critic_obs.flatten(0, 1)).view(num_steps + 1, num_envs)
    next_values = values[1:]
    if collector.envs.resets_in_step:
        # A time limit is no death, but the state that it cut off is lost: the one before stands in, as in rsl_rl.
        next_values = torch.where(time_out, values[:-1], next_values)
    terminated = done & ~time_out
    tensors = (obs[:-1], critic_obs[:-1], actions, log_probs, rewards, values[:-1], next_values)
    return Rollout(*tensors, terminated, done, resetting)


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    done: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Generalized advantage estimation (Algorithm 1, line 10; Schulman et al. 2016, Eq. 16). All (T, N).

    Args:
        next_values: value of the state that really followed, the final observation's where an episode ended.
        terminated: 0/1 or bool, the state had no future: no bootstrap. A time limit is not a termination.
        done: 0/1 or bool, terminated or truncated: the next row is another episode, so the trace is cut.
    """
    # Filled and not multiplied by 0: where a simulation broke and the episode was ended for it, the value may be NaN.
    deltas = rewards + gamma * next_values.masked_fill(terminated.bool(), 0.0) - values
    decays = gamma * gae_lambda * (1 - done.to(values))
    advantages, last = [], torch.zeros_like(values[0])
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind())):
        last = torch.addcmul(delta, decay, last)
        advantages.append(last)
    return torch.stack(advantages[::-1])


def minibatch_loss(
    policy, critic, args: Args, obs, critic_obs, actions, old_log_probs, advantages, returns, old_values
):
    """The function `update` of Algorithm 1, lines 19-23, on a minibatch of B. Returns the scalar loss and a tensor of
    policy loss, value loss, old approximate KL, approximate KL, share of clipped ratios."""
    log_ratio = policy.log_prob(obs, actions) - old_log_probs
    ratio = log_ratio.exp()  # r(theta), line 22
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # Eq. 2, line 23

    values = critic(critic_obs)
    errors = (values - returns).square()
    if args.clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        errors = torch.max(errors, (clipped_values - returns).square())
    value_loss = 0.5 * errors.mean()

    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef > 0:
        # No closed form: -E[log pi(a)] over samples of the current policy, differentiated through the samples.
        loss = loss + args.ent_coef * policy.sample(obs)[1].mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()  # Schulman's low-variance estimator, joschu.net/blog/kl-approx.html
        clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
        stats = torch.stack((policy_loss, value_loss, -log_ratio.mean(), approx_kl, clip_fraction))
    return loss, stats


def parameters_of(policy: nn.Module, critic: nn.Module) -> list[nn.Parameter]:
    return [p for p in (*policy.parameters(), *critic.parameters()) if p.requires_grad]


def flatten_parameters(parameters: list[nn.Parameter]) -> nn.Parameter:
    """One vector that holds all parameters; they become views of it. Then a single operation clips the gradients, one
    averages them over processes and one steps Adam, where there would be twenty each."""
    vector = nn.Parameter(parameters_to_vector(parameters).detach())
    vector_to_parameters(vector.data, parameters)
    return vector


def ppo_update(policy, critic, optimizer, rollout: Rollout, args: Args, loss_fn=minibatch_loss) -> dict[str, float]:
    """Algorithm 1, lines 10-17: N epochs of M minibatches.

    Args:
        optimizer: over the vector that `flatten_parameters` makes of the policy's and the critic's parameters.
        loss_fn: `minibatch_loss`, or its compiled form.
    """
    advantages = compute_gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.done,
        args.gamma,
        args.gae_lambda,
    )
    returns = advantages + rollout.values
    obs, actions, old_log_probs = rollout.obs, rollout.actions, rollout.log_probs
    if args.action_noise > 0:  # Sec. 5.1; the ratio compares both policies at the same, noisy action
        actions = actions + args.action_noise * torch.randn_like(actions)
        with torch.no_grad():
            old_log_probs = policy.log_prob(obs.flatten(0, 1), actions.flatten(0, 1)).view_as(old_log_probs)
    batch = (obs, rollout.critic_obs, actions, old_log_probs, advantages, returns, rollout.values)
    batch = [x.flatten(0, 1) for x in batch]
    rows = torch.arange(args.batch_size, device=obs.device)
    resetting = rollout.resetting.flatten()
    if resetting.any():  # others of the rollout, drawn at random, take the places of steps that only reset
        usable = rows[~resetting]
        rows = torch.where(resetting, usable[torch.randint_like(rows, len(usable))], rows)
    old_policy = copy.deepcopy(policy) if args.desired_kl is not None else None
    parameters = parameters_of(policy, critic)
    (vector,) = optimizer.param_groups[0]["params"]

    all_stats, grad_norms = [], []
    for _ in range(args.update_epochs):
        permutation = rows[torch.randperm(args.batch_size, device=obs.device)]
        for indexes in permutation.split(args.minibatch_size):
            minibatch = [x[indexes] for x in batch]
            loss, stats = loss_fn(policy, critic, args, *minibatch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            gradient = torch.cat([x.flatten() for x in gradients])
            average_processes(gradient)
            norm = gradient.norm()
            vector.grad = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            if args.desired_kl is not None:
                optimizer.param_groups[0]["lr"] = adapt_learning_rate(
                    optimizer.param_groups[0]["lr"], kl_divergence(policy, old_policy, minibatch[0], stats), args
                )
            optimizer.step()  # line 24
            grad_norms.append(norm)
            all_stats.append(stats)

    stats = torch.stack(all_stats)
    variance = returns.var()
    return {
        "losses/policy_loss": stats[-1, 0].item(),
        "losses/value_loss": stats[-1, 1].item(),
        "losses/old_approx_kl": stats[-1, 2].item(),
        "losses/approx_kl": stats[-1, 3].item(),
        "losses/clipfrac": stats[:, 4].mean().item(),
        "losses/entropy": -rollout.log_probs.mean().item(),  # of the policy that acted, from its own samples
        "losses/explained_variance": (1 - (returns - rollout.values).var() / variance).item() if variance > 0 else 0.0,
        "losses/grad_norm": torch.stack(grad_norms).mean().item(),
    }


@torch.no_grad()
def kl_divergence(policy, old_policy, obs: torch.Tensor, stats: torch.Tensor) -> float:
    """KL(old || new) on a minibatch: exact where the policy has a closed form, `.kl(old_policy, obs) -> (B,)`, else
    the estimate that is among the loss's statistics. The mean over all processes."""
    kl = policy.kl(old_policy, obs).mean() if hasattr(policy, "kl") else stats[3].clone()
    return average_processes(kl).item()


def adapt_learning_rate(learning_rate: float, kl: float, args: Args) -> float:
    """rsl_rl's rule (PPO-adaptive of the paper), before each gradient step."""
    if kl > 2 * args.desired_kl:
        return max(1e-5, learning_rate / 1.5)
    if 0 < kl < args.desired_kl / 2:
        return min(1e-2, learning_rate * 1.5)
    return learning_rate


def average_processes(x: torch.Tensor) -> torch.Tensor:
    """Data parallelism: replace `x` by its mean over all processes. Alone, nothing happens."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def gather_processes(mine) -> list:
    """What each process holds, in the order of their ranks."""
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def agree_on(number: int) -> int:
    """The largest `number` of all processes."""
    largest = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write atomically: whoever reads `path`, whenever, finds a whole checkpoint."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, policy_class: Optional[type] = None, flag: str = "--evaluate") -> dict:
    """Read a checkpoint, given as its file or its run folder.

    Only tensors and plain values are read (`weights_only=True`), so a stranger's file cannot run code.

    Raises:
        BadInput: naming `flag`, if there is none, it cannot be read, or it holds another class than `policy_class`.
    """
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise BadInput(f"{flag} is {path}, which holds no checkpoint; allowed is a run folder or its checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        found = checkpoint["policy_class"]
    except Exception as error:
        # torch.load has no error class of its own: a truncated file raises one of a dozen kinds.
        raise BadInput(f"{flag} is {path}, whose checkpoint is truncated or not of this script") from error
    if policy_class is not None and found != policy_class.__name__:
        raise BadInput(f"{flag} is {path}, which holds a {found}; this script trains {policy_class.__name__}")
    return checkpoint


def random_state(device: torch.device) -> dict:
    """The states of all random number generators that this process uses."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def event_files(run_dir: Path) -> dict[str, int]:
    """TensorBoard's files in a run folder, with their sizes."""
    return {file.name: file.stat().st_size for file in sorted(run_dir.glob("events.out.tfevents.*"))}


def cut_event_files(run_dir: Path, sizes: dict[str, int]) -> None:
    """Take the events back to a checkpoint, so that what is computed again is logged once."""
    for name in event_files(run_dir):
        if name in sizes:
            os.truncate(run_dir / name, sizes[name])
        else:
            (run_dir / name).unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and export
# ----------------------------------------------------------------------------------------------------------------------


class DeployedPolicy(nn.Module):
    """What a robot runs: raw observations (B, obs_dim) in, actions (B, action_dim) out, neither clipped nor scaled."""

    def __init__(self, policy: nn.Module, obs_dim: int, obs_stats: Optional[RunningMeanStd]):
        super().__init__()
        self.policy, self.obs_dim = policy, obs_dim
        self.normalizes = obs_stats is not None
        if self.normalizes:  # in float64 as in training: a mean much above the deviation would cost float32 its digits
            self.register_buffer("mean", obs_stats.mean)
            self.register_buffer("std", obs_stats.std)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.act(obs, temperature=0.0)

    def act(self, obs: torch.Tensor, temperature: float) -> torch.Tensor:
        if self.normalizes:
            obs = ((obs - self.mean) / self.std).clamp(-10, 10).float()
        return self.policy.sample(obs, temperature=temperature)[0]

    def typical_obs(self, count: int) -> torch.Tensor:
        """Observations (count, obs_dim) to compare exports on: spread as in training where --normalize-obs has kept
        how, else standard normal."""
        obs = torch.randn(count, self.obs_dim, generator=torch.Generator().manual_seed(0))
        return (obs * self.std + self.mean).float() if self.normalizes else obs


def evaluate(
    checkpoint: str | Path,
    policy_class: type = FlowPolicy,
    eval_episodes: int = 100,
    temperature: float = 0.0,
    seed: int = 1,
    device: str = "cuda:0",
    headless: bool = True,
    randomize: bool = True,
    export_jit: Optional[str] = None,
    export_onnx: Optional[str] = None,
) -> list[float]:
    """Export a trained policy, play it with its observation statistics frozen, and return undiscounted episode returns.

    Args:
        checkpoint: run folder or checkpoint file.
        policy_class: class that the checkpoint was trained with.
        eval_episodes: one in each of as many environments; with 0 no simulator is needed.
        temperature: factor on the standard deviation of the base noise; 0 is the deterministic policy.
        seed: of the environments and the noise.
        device, headless, randomize: as in `Args`.
        export_jit, export_onnx: files to write the deterministic policy to.

    Raises:
        BadInput: for a checkpoint that is missing, truncated or of another policy, or a simulator that is missing.
        WrongExport: for an exported file that computes something else than the policy; none is left then.
    """
    state = load_checkpoint(checkpoint, policy_class)
    args = Args(**state["args"])
    if eval_episodes:
        import_simulator(args.env_id)
        check_isaacgymenvs(args.env_id, device, randomize)
    policy = make_policy(policy_class, state["obs_dim"], state["action_dim"], args)
    policy.load_state_dict(state["policy"])
    obs_stats = None
    if args.normalize_obs:
        obs_stats = RunningMeanStd(state["obs_dim"], torch.device("cpu"))
        obs_stats.load_state_dict(state["processes"][0]["collector"]["stats"][0])
    deployed = DeployedPolicy(policy, state["obs_dim"], obs_stats).eval()
    export_policy(deployed, export_jit, export_onnx)
    if not eval_episodes:
        return []

    envs = make_envs(args.env_id, eval_episodes, seed, device, headless, randomize)
    deployed.to(device)
    torch.manual_seed(seed)
    returns = torch.zeros(eval_episodes, device=device)
    playing, timed_out = torch.ones_like(returns, dtype=torch.bool), torch.zeros_like(returns, dtype=torch.bool)
    means = EpisodeMeans()
    with torch.no_grad():
        obs, _ = envs.reset()
        while playing.any():
            step = envs.step(deployed.act(obs, temperature))
            returns += step.reward.masked_fill(~playing, 0.0)
            timed_out |= step.time_out & playing
            num_ended = (step.done & playing).sum()
            means.add(num_ended, {name: x * num_ended for name, x in step.terms.items()})
            playing &= ~step.done
            obs = step.obs
    print(f"{timed_out.sum().item()} of {eval_episodes} episodes lasted until the time limit.")
    terms = means.pop()[1]
    if terms:
        print("The task's own means: " + ", ".join(f"{name} {mean:.4g}" for name, mean in terms.items()))
    return returns.tolist()


class WrongExport(RuntimeError):
    """An exported file computes something else than the policy; `main` prints it as one line, exit status 1."""


def export_policy(deployed: DeployedPolicy, jit: Optional[str], onnx: Optional[str]) -> None:
    """Write `deployed` to the files that are named. They get their names together, once each was compared with it.

    Raises:
        WrongExport: for one that differs. None is left then, since it might reach a robot.
    """
    files = [(path, f"{path}.tmp", write) for path, write in ((jit, to_jit), (onnx, to_onnx)) if path]
    try:
        for path, temporary, write in files:
            compare_export(deployed, write(deployed, temporary), path)
        for path, temporary, _ in files:
            os.replace(temporary, path)
            print(f"Wrote {path}.")
    finally:
        for _, temporary, _ in files:
            if os.path.exists(temporary):
                os.remove(temporary)


def to_jit(deployed: DeployedPolicy, path: str):
    """Write `deployed` as TorchScript for the CPU, float32 (1, obs_dim) to float32 (1, action_dim), and load it."""
    with torch.no_grad():
        module = torch.jit.freeze(torch.jit.trace(deployed, deployed.typical_obs(1)))
    torch.jit.save(module, path)
    return torch.jit.load(path)


def to_onnx(deployed: DeployedPolicy, path: str):
    """Write `deployed` as ONNX, float32 (batch, obs_dim) to float32 (batch, action_dim), and load it."""
    import onnxruntime

    obs, axes = deployed.typical_obs(1), {"obs": {0: "batch"}, "action": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        torch.onnx.export(deployed, (obs,), path, input_names=["obs"], output_names=["action"], dynamic_axes=axes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # on networks this small, threads cost more than they do
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"obs": x.numpy()})[0])


@torch.no_grad()
def compare_export(deployed: DeployedPolicy, exported, path: str) -> float:
    """Compare what was loaded with the policy it came from, one observation at a time.

    Returns the largest difference, of actions above 1 as a share of them. Raises `WrongExport` if it is above 1e-5.
    """
    expected, found, seconds = [], [], []
    for x in deployed.typical_obs(256).split(1):
        expected.append(deployed(x))
        start = time.perf_counter()
        found.append(exported(x))
        seconds.append(time.perf_counter() - start)
    expected = torch.cat(expected)
    # Of actions above 1 a share: float32 has seven digits, and those of a trained policy may well be 50. Its layers add
    # up rounding to some 2e-6; what is wrong differs by far more.
    difference = ((torch.cat(found) - expected).abs() / expected.abs().clamp(min=1)).max().item()
    if not difference <= 1e-5:
        raise WrongExport(
            f"{path} would differ from the policy by {difference:.1e}, allowed is 1e-5; nothing is written"
        )
    milliseconds = 1000 * float(np.median(seconds))
    print(f"{path}: {difference:.1e} from the policy at most, {milliseconds:.2f} ms a decision on this CPU.")
    return difference


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """Return, steps/s, KL and time left: a bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, total: int, start: int, enabled: bool):
        self.total, self.start, self.enabled = total, start, enabled
        self.start_time = self.last_time = time.time()
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", unit_scale=True, dynamic_ncols=True)

    def update(self, step: int, episodic_return: float, kl: float) -> int:
        """Show the state after `step` steps; returns steps/s since the start of this process."""
        now = time.time()
        sps = (step - self.start) / (now - self.start_time)
        if not self.enabled:
            return int(sps)
        if self.bar is not None:
            self.bar.set_postfix_str(f"return {episodic_return:.0f}, KL {kl:.3f}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last_time >= 10 or step >= self.total:
            self.last_time = now
            left = datetime.timedelta(seconds=int((self.total - step) / sps))
            print(
                f"step {step}/{self.total}  return {episodic_return:.1f}  {sps:.0f} steps/s  KL {kl:.4f}  ETA {left}",
                flush=True,
            )
        return int(sps)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class StopSignal:
    """Remembers SIGTERM or Ctrl-C, so that the iteration is finished and saved; a second one ends at once."""

    def __init__(self):
        self.number = 0
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number, _frame) -> None:
        self.number = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class RecentReturn:
    """Mean return of the last 100 episodes or so: [episodes, mean] of as many iterations as hold that many."""

    def __init__(self, recent: list):
        self.recent = recent

    def add(self, count: int, mean: float) -> None:
        if count:
            self.recent.append([count, mean])
        while sum(count for count, _ in self.recent[1:]) >= 100:
            del self.recent[0]

    def mean(self) -> float:
        total = sum(count for count, _ in self.recent)
        return sum(count * mean for count, mean in self.recent) / total if total else float("nan")


class NonFinite(ArithmeticError):
    """Training left the finite numbers; `main` prints it as one line and exits with status 3."""


def compile_functions(policy, critic, args: Args, envs, device: torch.device):
    """`policy.sample` and `minibatch_loss`, compiled where that works: the same functions, only faster.

    A missing compiler raises, and PyTorch 2.4.1 was seen to compile the gradients of one-dimensional actions wrongly
    without a word. So both are tried here on random numbers and compared with what they were compiled from.
    """
    if not args.compile:
        return policy.sample, minibatch_loss
    torch._inductor.config.fallback_random = True  # draw the random numbers that eager mode draws
    compiled = (
        torch.compile(policy.sample, dynamic=False),
        torch.compile(minibatch_loss, dynamic=False, fullgraph=True),
    )
    print("Compiling; the first time on a machine this takes up to a minute (--no-compile starts at once).", flush=True)
    state = random_state(device)
    try:
        widths = (envs.obs_dim, envs.critic_obs_dim or envs.obs_dim, envs.action_dim)
        obs, *minibatch = (torch.randn(args.minibatch_size, width, device=device) for width in widths)
        minibatch += torch.randn(4, args.minibatch_size, device=device)
        minibatch[2] = policy.log_prob(obs, minibatch[1]).detach()  # old log-probabilities: the ratio is 1
        results = []
        for sample, loss_fn in ((policy.sample, minibatch_loss), compiled):
            torch.manual_seed(0)
            with torch.no_grad():
                action, log_prob = sample(torch.ones(args.num_envs, envs.obs_dim, device=device))
            loss, stats = loss_fn(policy, critic, args, obs, *minibatch)
            gradients = torch.autograd.grad(
                loss, parameters_of(policy, critic), allow_unused=True, materialize_grads=True
            )
            results.append([x.detach().flatten() for x in (action, log_prob, stats, *gradients)])
        for eager, fast in zip(*results):
            if (eager - fast).norm() > 1e-3 * eager.norm() + 1e-5:
                raise RuntimeError("it computes something else")
    except Exception as error:
        # The compiler's errors are its own and change with versions; none of them may cost anybody a training run.
        print(f"torch.compile does not work here ({str(error).strip().splitlines()[0]}): going on eagerly, slower.")
        return policy.sample, minibatch_loss
    finally:
        set_random_state(state, device)
    return compiled


def train(args: Args, policy_class: type = FlowPolicy) -> dict:
    """Train as `args` say and return final metrics, `run_dir` among them.

    `policy_class(obs_dim, action_dim)` is any `nn.Module` with `sample` and `log_prob` as in `FlowPolicy`.

    Raises:
        BadInput: with nothing left behind.
        NonFinite: where losses or parameters stop being numbers; the last good checkpoint is kept.
    """
    distributed = "RANK" in os.environ  # started by torchrun
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local_rank = (int(os.environ[name]) for name in names) if distributed else (0, 1, 0)
    if args.resume is not None:
        found, _ = read_args(args.resume)
        if found != policy_class.__name__:  # said before a flag that only the other policy has is said to be wrong
            raise BadInput(f"--resume is {args.resume}, a run of {found}; this script trains {policy_class.__name__}")
    if distributed and args.device.startswith("cuda"):
        args = dataclasses.replace(args, device=f"cuda:{local_rank}")
    check_args(args, policy_class, world_size)
    device = torch.device(args.device)
    import_simulator(args.env_id)
    check_isaacgymenvs(args.env_id, args.device, args.randomize)
    stop = StopSignal()
    torch.set_num_threads(args.torch_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    run_dir = None
    try:
        run_dir, checkpoint = open_run(args, policy_class, rank, world_size)
        envs = make_envs(args.env_id, args.num_envs, args.seed + rank, args.device, args.headless, args.randomize)
        if rank == 0:  # whoever deploys compares it with the robot: action scale, default angles, gains, ...
            (run_dir / "env_cfg.json").write_text(json.dumps(envs.cfg, indent=2, default=plain) + "\n")
        metrics = train_loop(args, policy_class, envs, device, run_dir, checkpoint, rank, world_size, stop)
        if distributed:
            dist.barrier()  # or a process that leaves early, while another still writes, was seen to hang
        return metrics
    except BadInput:
        if rank == 0 and run_dir and not args.resume:  # Weights & Biases refuses only once there is a folder
            shutil.rmtree(run_dir)
        raise
    finally:
        stop.restore()
        if distributed:
            dist.destroy_process_group()


def open_run(args: Args, policy_class: type, rank: int, world_size: int) -> tuple[Path, Optional[dict]]:
    """The run's folder, made anew or resumed, and the checkpoint to continue from, if there is one."""
    if args.resume is not None:
        run_dir, checkpoint = Path(args.resume), None
        if (run_dir / "checkpoint.pt").exists():
            checkpoint = load_checkpoint(run_dir, policy_class, "--resume")
            for name, value in checkpoint["args"].items():
                if name not in resume_flags(args) and value != getattr(args, name):
                    raise BadInput(
                        f"--resume is {run_dir}, whose checkpoint was made with {as_flag(name)} {value} and whose "
                        f"args.json says {getattr(args, name)}"
                    )
            if len(checkpoint["processes"]) != world_size:
                raise BadInput(
                    f"--resume is {run_dir}, a run of {len(checkpoint['processes'])} processes, not of {world_size}; "
                    "start it with as many"
                )
            if args.total_timesteps < checkpoint["global_step"]:
                done = f"the {checkpoint['global_step']} steps that {run_dir} has done"
                raise BadInput(f"--total-timesteps is {args.total_timesteps}, allowed is at least {done}")
        if rank == 0:
            cut_event_files(run_dir, checkpoint["event_files"] if checkpoint else {})
            _, saved = read_args(args.resume)
            write_args(run_dir, policy_class, {**saved, "total_timesteps": args.total_timesteps})
        return run_dir, checkpoint
    message = [None]
    if rank == 0:
        try:
            message = [str(new_run_dir(args, policy_class))]
        except BadInput as error:
            message = [error]  # all processes have to end, not this one alone
    if world_size > 1:
        dist.broadcast_object_list(message)
    if isinstance(message[0], BadInput):
        raise message[0]
    return Path(message[0]), None


def new_run_dir(args: Args, policy_class: type) -> Path:
    """Make the run's folder with its arguments in it, both at once: a run killed at any moment can be resumed."""
    temporary = Path(args.runs_dir, f".new-{os.getpid()}-{time.time_ns()}")
    try:
        temporary.mkdir(parents=True)
        write_args(temporary, policy_class, dataclasses.asdict(args))
    except OSError as error:
        raise BadInput(f"--runs-dir is {args.runs_dir}, allowed is a folder to write to: {error}") from error
    for now in itertools.count(int(time.time())):  # a second run in the same second takes the next one
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}".replace("/", "-").replace(":", "-")
        try:
            return temporary.rename(Path(args.runs_dir, name))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                shutil.rmtree(temporary)
                raise BadInput(f"--exp-name is {args.exp_name}, allowed is a part of a file name: {error}") from error


def write_args(run_dir: Path, policy_class: type, args: dict) -> None:
    """Write args.json, atomically: a run that lost it could not be resumed."""
    temporary = run_dir / "args.tmp"
    temporary.write_text(json.dumps({"policy_class": policy_class.__name__, **args}, indent=2) + "\n")
    temporary.replace(run_dir / "args.json")


def plain(x):
    """For JSON, what a task's configuration holds beside plain values: NumPy's numbers, OmegaConf's lists, ..."""
    if hasattr(x, "tolist"):
        return x.tolist()
    return list(x) if hasattr(x, "__iter__") else str(x)


def train_loop(args, policy_class, envs, device, run_dir, checkpoint, rank, world_size, stop: StopSignal) -> dict:
    """Algorithm 1, with everything around it. Called by `train`."""
    is_main = rank == 0
    iteration, global_step = (checkpoint["iteration"], checkpoint["global_step"]) if checkpoint else (0, 0)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)  # every process starts from the same networks
    policy = make_policy(policy_class, envs.obs_dim, envs.action_dim, args).to(device)
    critic = Critic(envs.critic_obs_dim or envs.obs_dim, args.critic_hidden_dims).to(device)
    parameters = flatten_parameters(parameters_of(policy, critic))
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, fused=True)
    torch.manual_seed(args.seed + rank)  # and from here on has noise, episodes and minibatches of its own
    collector = Collector(envs, args, device)
    # What all processes agree on; what each sees from here on, the reset included, is merged after the iteration.
    agreed = collector.stats()
    recent = RecentReturn(checkpoint["recent_returns"] if checkpoint else [])
    if checkpoint:
        policy.load_state_dict(checkpoint["policy"])
        critic.load_state_dict(checkpoint["critic"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        mine = checkpoint["processes"][rank]
        collector.load_state_dict(mine["collector"])
        agreed = collector.stats()
        set_random_state(mine["random"], device)
        if is_main:
            print("Isaac Gym cannot be restored within an episode: all episodes start anew.")
    collector.reset(args.random_initial_steps)
    sample, loss_fn = compile_functions(policy, critic, args, envs, device)

    writer = open_logs(args, run_dir, new=checkpoint is None) if is_main else None
    num_iterations = args.num_iterations(world_size)
    steps_per_iteration = args.batch_size * world_size
    progress = Progress(num_iterations * steps_per_iteration, global_step, enabled=is_main)
    saved_iteration, metrics, sps, start_time = iteration, {}, 0, time.time()
    stop_signal = 0  # read once an iteration, so that all processes, and saving and leaving, agree on it

    try:
        while iteration < num_iterations and not stop_signal:
            iteration += 1
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate
            rollout = collect_rollout(collector, sample, critic, args.num_steps)
            metrics = ppo_update(policy, critic, optimizer, rollout, args, loss_fn)
            broken = [name for name, value in metrics.items() if not math.isfinite(value)]
            if broken or not torch.isfinite(parameters).all():
                raise NonFinite(f"{broken[0] if broken else 'a parameter'} is not finite")
            if world_size > 1 and args.normalize_obs:
                for stats, before in zip(collector.all_stats(), agreed):
                    stats.merge_processes(before)
                agreed = collector.stats()
            num_episodes, means = collector.means.pop()
            recent.add(num_episodes, means.get("charts/episodic_return", 0.0))
            global_step += steps_per_iteration
            sps = progress.update(global_step, recent.mean(), metrics["losses/approx_kl"])
            if hasattr(policy, "diagnostics"):  # on every eighth transition: enough for a mean
                metrics.update(policy.diagnostics(rollout.obs.flatten(0, 1)[::8], rollout.actions.flatten(0, 1)[::8]))
            metrics.update({"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": sps, **means})
            if is_main:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, global_step)

            stop_signal = agree_on(stop.number)
            is_kept = args.keep_interval is not None and iteration % args.keep_interval == 0
            is_due = (iteration - 1) % args.checkpoint_interval == 0 or iteration == num_iterations
            if is_due or is_kept or stop_signal:
                processes = gather_processes({"collector": collector.state_dict(), "random": random_state(device)})
                if is_main:
                    writer.flush()
                    checkpoint = {
                        "policy_class": policy_class.__name__,
                        "args": dataclasses.asdict(args),
                        "obs_dim": envs.obs_dim,
                        "action_dim": envs.action_dim,
                        "iteration": iteration,
                        "global_step": global_step,
                        # Copies, or each would bring along the whole vector that it is a view of.
                        "policy": {name: x.clone() for name, x in policy.state_dict().items()},
                        "critic": {name: x.clone() for name, x in critic.state_dict().items()},
                        "optimizer": optimizer.state_dict(),
                        "recent_returns": recent.recent,
                        "processes": processes,
                        "event_files": event_files(run_dir),
                    }
                    if is_kept:
                        save_checkpoint(run_dir / f"checkpoint-{global_step}.pt", checkpoint)
                    save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
                saved_iteration = iteration
    except NonFinite as error:
        culprit = (
            "--scale-fn none usually causes this: nothing bounds exp(s); the default, tanh, does"
            if args.scale_fn == "none"
            else "usually --learning-rate is too high, --scale-bound too wide, or the simulator gave NaN"
        )
        kept = (
            f"the checkpoint of iteration {saved_iteration} is kept in {run_dir}" if saved_iteration else "none saved"
        )
        raise NonFinite(f"stopped in iteration {iteration}: {error}. {culprit}; {kept}") from error
    finally:
        progress.close()
        if is_main:
            writer.close()
            if args.track:
                import wandb

                wandb.finish()

    if is_main:
        print_summary(run_dir, global_step, sps, time.time() - start_time, recent.mean(), stop_signal)
    return {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "episodic_return": recent.mean(),
        "stop_signal": stop_signal,
        **metrics,
    }


def open_logs(args: Args, run_dir: Path, new: bool) -> SummaryWriter:
    """TensorBoard's writer, mirrored to Weights & Biases with --track."""
    if args.track:
        try:
            import wandb
        except ImportError as error:
            raise BadInput(f"--track needs `pip install wandb`: {error}") from error
        try:
            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                id=run_dir.name,
                name=run_dir.name,
                resume="allow",
                sync_tensorboard=True,
                config=dataclasses.asdict(args),
                allow_val_change=True,  # a continued run may be longer
                dir=str(run_dir),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"--track cannot log in: {reason}; WANDB_MODE=offline needs no account") from error
    writer = SummaryWriter(str(run_dir))
    if new:
        rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    return writer


def print_summary(run_dir: Path, global_step: int, sps: int, seconds: float, mean: float, stop_signal: int) -> None:
    command = f"python {sys.argv[0]}"
    print(f"Return of the last episodes: {mean:.2f}")
    print(f"{global_step} steps; this session took {seconds:.0f} s at {sps} steps/s. Everything is in {run_dir}")
    if stop_signal:
        again = f"torchrun, as before, {sys.argv[0]}" if dist.is_initialized() else command
        print(f"Stopped by {signal.Signals(stop_signal).name} and saved. Continue: {again} --resume {run_dir}")
        return
    print(f"  evaluate  {command} --evaluate {run_dir}")
    print(f"  watch     {command} --evaluate {run_dir} --eval-episodes 16 --no-headless")
    print(
        f"  export    {command} --evaluate {run_dir} --eval-episodes 0 --export-jit policy.pt --export-onnx policy.onnx"
    )
    print(f"  curves    tensorboard --logdir {run_dir.parent}")


def read_args(run_dir: str) -> Tuple[str, dict]:
    """Policy class and arguments of a run. Raises `BadInput` where its args.json cannot be read."""
    try:
        saved = json.loads(Path(run_dir, "args.json").read_text())
        return saved.pop("policy_class"), saved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--resume is {run_dir}, which holds no run (no readable args.json)") from error


def parse_args(
    argv: Optional[list[str]] = None, defaults: Optional[Args] = None, policy_class: type = FlowPolicy
) -> Args:
    """The command line. With --resume or --evaluate, the defaults are the run's own arguments.

    Raises:
        BadInput: for a run that cannot be read, a checkpoint to evaluate of another policy, a flag that contradicts it.
    """
    description = __doc__.split("\n")[0]
    args = tyro.cli(Args, args=argv, default=defaults or Args(), description=description)
    resumes, evaluates = args.resume is not None, args.evaluate is not None  # an empty name is one, and a bad one
    if not (resumes or evaluates):
        return args
    if resumes and evaluates:
        raise BadInput("--resume and --evaluate are given, allowed is one of them")
    flag, path = ("--resume", args.resume) if resumes else ("--evaluate", args.evaluate)
    if resumes:
        _, saved = read_args(path)
    else:
        saved = load_checkpoint(path, policy_class)["args"]
    try:
        saved = Args(**saved)
        saved.critic_hidden_dims = tuple(saved.critic_hidden_dims)  # JSON knows no tuples
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # tyro only warns of a default of another type
            args = tyro.cli(Args, args=argv, default=saved, description=description)
    except (TypeError, UserWarning) as error:
        reason = str(error).split(". ")[0]
        raise BadInput(f"{flag} is {path}, a run with other arguments than this script's: {reason}") from error
    free = resume_flags(saved) if resumes else EVALUATE_FLAGS
    for name, value in dataclasses.asdict(args).items():
        if name not in free and value != getattr(saved, name):
            why = " (its learning rate is annealed over them)" if name == "total_timesteps" and resumes else ""
            raise BadInput(
                f"{as_flag(name)} is {value}, but {path} was run with {getattr(saved, name)}{why}; leave the flag out"
            )
    return args


def main(policy_class: type = FlowPolicy, defaults: Optional[Args] = None) -> None:
    """The command line: train, resume or evaluate."""
    try:
        args = parse_args(defaults=defaults, policy_class=policy_class)
        if args.evaluate is not None:
            check_args(args, policy_class)
            torch.set_num_threads(args.torch_threads)
            returns = evaluate(
                args.evaluate,
                policy_class,
                args.eval_episodes,
                args.temperature,
                args.seed,
                args.device,
                args.headless,
                args.randomize,
                args.export_jit,
                args.export_onnx,
            )
            if returns:
                print(
                    f"{len(returns)} episodes of {args.env_id} at temperature {args.temperature:g}: "
                    f"return {np.mean(returns):.2f} ± {np.std(returns):.2f}"
                )
        else:
            stop_signal = train(args, policy_class)["stop_signal"]
            if stop_signal:
                sys.exit(128 + stop_signal)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except WrongExport as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
