"""Two boards with several equally good goals, after the paper's Fig. 6 (Sec. 5.3), following McAllister et al. (2025).

Run:     python nfpo_continuous_action.py --env-id benchmarks.envs.gridworld:GridWorld-v0
"""

from typing import Optional

import gymnasium as gym
import numpy as np

DIRECTIONS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)], dtype=np.float32)
REACH = 0.5  # cells, from a cell's center to its edges
START = np.zeros(2, dtype=np.float32)  # center of the grey cell
TIME_LIMIT = 12  # steps
PIXELS = 32  # of a cell's side in a frame, which film encoders want to be even
WHITE, LINE, GREY, GREEN, RED = (255, 255, 255), (210, 210, 210), (160, 160, 160), (120, 200, 120), (200, 40, 40)


class GridWorld(gym.Env):
    """A point on a board of 7 x 7 cells that has to enter a green cell.

    Observation: the position (x, y) in cells, (0, 0) being the board's center. Box(-3.5, 3.5, (2,)), float32.
    Action: the displacement in units of 1.5 cells. Box(-1, 1, (2,)), float32; what lies outside is clipped.
    Start: the center of the grey cell, the same in every episode.
    Reward: 1 on entering a green cell, which terminates the episode, and 0 otherwise. 12 steps are the time limit; the
        shortest way takes two.
    Info: `goal`, the index in `goals` of the green cell that was entered, -1 until then.

    The green cells are the middles of the four sides. From the start they are equally far and the board looks the same
    towards each, so that any distribution over them is optimal. The walls clip the position: no point is out of play.

    Several goals are no sign of several modes here. Whoever is in no hurry wanders to whichever is next, and clipping
    aims: a single wide Gaussian is thrown into a corner of the Box, and from there a second corner is a goal.
    """

    size, step_size, limit, has_pits = 7, 1.5, 1.0, False
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, render_mode: Optional[str] = None):
        self.render_mode = render_mode
        self.half = self.size / 2
        self.goals = DIRECTIONS * (self.size // 2)  # centers of the green cells
        self.observation_space = gym.spaces.Box(-self.half, self.half, (2,))
        self.action_space = gym.spaces.Box(-self.limit, self.limit, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = START.copy()
        return self.position.copy(), {"goal": -1}

    def step(self, action):
        target = self.position + self.step_size * np.clip(action, -self.limit, self.limit)
        self.position = np.clip(target, -self.half, self.half).astype(np.float32)
        landed = target if self.has_pits else self.position  # walls stop, pits do not
        entered = (np.abs(landed - self.goals) <= REACH).all(-1)  # (goals,)
        goal = int(entered.argmax()) if entered.any() else -1
        fell = self.has_pits and goal < 0 and bool((np.abs(landed - START) > REACH).any())
        return self.position.copy(), float(goal >= 0), fell or goal >= 0, False, {"goal": goal}

    def render(self):
        """The board and, as a red dot, the point. -> (32 size, 32 size, 3) uint8, or None without a render mode."""
        if self.render_mode is None:
            return None
        frame = np.full((self.size * PIXELS, self.size * PIXELS, 3), WHITE, dtype=np.uint8)
        # The center of every pixel as a position; an image's first row is the top, where y is largest.
        x, y = np.meshgrid(*[(np.arange(self.size * PIXELS) + 0.5) / PIXELS - self.half] * 2)
        pixels = np.stack([x, -y], axis=-1)
        for cell, color in ((START, GREY), *((goal, GREEN) for goal in self.goals)):
            frame[(np.abs(pixels - cell) <= REACH).all(-1)] = color
        frame[::PIXELS] = frame[:, ::PIXELS] = LINE
        frame[np.linalg.norm(pixels - self.position, axis=-1) <= 0.2] = RED
        return frame


class JumpWorld(GridWorld):
    """A smaller board on which only aimed actions pay: to land on a white cell, or beside the board, ends it all.

    5 x 5 cells. Action: the displacement in cells. Box(-4, 4, (2,)); clipped actions land beside the board. Whatever
    else is as on GridWorld. Every green cell is one action away. A single Gaussian with independent components whose
    goals have an entropy of one bit hits one with three jumps in ten at best, while one that has chosen can hit with
    every jump, and so can a mixture with a narrow mode for each of the four.
    """

    size, step_size, limit, has_pits = 5, 1.0, 4.0, True


gym.register("GridWorld-v0", GridWorld, max_episode_steps=TIME_LIMIT)
gym.register("JumpWorld-v0", JumpWorld, max_episode_steps=TIME_LIMIT)
