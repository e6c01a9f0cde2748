"""Settings that reach the published returns: (agent, environment) -> what differs from the agent's defaults.

"env_steps" is the length of the run. What is not listed runs with the defaults.
"""

from typing import Any

PRESETS: dict[tuple[str, str], dict[str, Any]] = {}
