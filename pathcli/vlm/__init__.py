"""Image and question in, answer out: connectors, language models, chat, their training tasks."""
