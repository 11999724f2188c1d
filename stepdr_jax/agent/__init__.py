"""The agent: who acts (policies), the one episode loop, its prompts and its budgets."""
