"""The data engines: how CLOVER, PathGen and PA-LLaVA made their data, each as one command."""
