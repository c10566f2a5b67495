"""Time and memory of a step beside TRL on the same work, how they grow, where they go. See docs/performance.md."""
