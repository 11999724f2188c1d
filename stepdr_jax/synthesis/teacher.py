"""The teacher of synthesis: an OpenAI-compatible model when an endpoint is configured, else a scripted expert."""

import os
from collections.abc import Callable

from ml_collections import ConfigDict

from stepdr_jax.agent.policy import EndpointPolicy, Policy
from stepdr_jax.errors import UserError
from stepdr_jax.records import Task


class Teacher:
    """The policy that acts on a task: `teacher(task, style, seed)`.

    Args:
        config: `teacher.endpoint`, `teacher.model`, `teacher.api_key_env`.
        expert: makes the scripted expert of a task, a style and a seed; used when no endpoint is configured.

    Raises:
        UserError: an endpoint without a model name.
    """

    def __init__(self, config: ConfigDict, expert: Callable[..., Policy]) -> None:
        self._expert = expert
        self._endpoint: EndpointPolicy | None = None
        chosen = config.teacher
        if not chosen.endpoint:
            return
        if not chosen.model:
            raise UserError(
                f"teacher.model: expected the model's name at {chosen.endpoint}, got an empty string; "
                "set --config.teacher.model"
            )
        self._endpoint = EndpointPolicy(
            chosen.endpoint,
            chosen.model,
            os.environ.get(chosen.api_key_env, ""),
            concurrency=config.synthesis.episode_concurrency,
        )

    def __call__(self, task: Task, style, seed: int) -> Policy:
        if self._endpoint is not None:
            return self._endpoint
        return self._expert(task, style, seed)

    async def close(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()
