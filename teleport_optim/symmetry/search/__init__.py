"""The search for symmetries: records what a model computes, follows its channels, solves for what may move."""
