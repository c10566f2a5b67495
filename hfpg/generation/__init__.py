"""The actor: engines that draw completions from the policy. A generator is `__call__(policy, prompts) -> Samples`."""
