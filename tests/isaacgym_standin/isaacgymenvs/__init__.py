"""Stand-in for IsaacGymEnvs, see ../README.md."""


class ListConfig:
    """As OmegaConf's, which stay in the configurations: a sequence that is no list."""

    def __init__(self, content):
        self.content = content

    def __iter__(self):
        return iter(self.content)


def make(
    seed,
    task,
    num_envs,
    sim_device,
    rl_device,
    graphics_device_id=-1,
    headless=False,
    multi_gpu=False,
    force_render=True,
):
    """As in the real one, `seed` reaches nothing."""
    from isaacgymenvs.tasks import isaacgym_task_map

    cfg = {"name": task, "env": {"numEnvs": num_envs, "clipActions": 1.0}, "sim": {"gravity": ListConfig((0.0, -9.81))}}
    return isaacgym_task_map[task](cfg, rl_device)
