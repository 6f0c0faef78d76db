"""An HTTP server with OpenAI's interface, over the engine and the encoders of the runtime."""
