"""Questions about images over HTTP, in OpenAI's chat format. Research use only.

`wire` knows the format, `pictures` the images inside requests, `worker` the model's one thread,
`server` addresses, tokens and limits.
"""
