"""Which function does a task."""

import inspect
from importlib import import_module

import pytest

from inference.config import TASKS, InferenceConfig
from inference.run import FUNCTIONS


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_a_function_that_takes_the_settings(task: str) -> None:
    module, name = FUNCTIONS[task]
    first, *others = inspect.signature(getattr(import_module(module), name)).parameters.values()
    assert first.annotation is InferenceConfig
    assert len(others) == (task == "generate")  # the conversation, which is checked before torch is imported
