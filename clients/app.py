"""The Flower ClientApp. It is thin: torch and the model are imported when the first message asks for work."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the cohort of clients that the message names."""
    from fedsim.flower import worker

    return worker.train(message, context)


@app.train("initial_gradient")
def initial_gradient(message: Message, context: Context) -> Message:
    """Returns the named clients' weight gradients, from which the server derives the common bases."""
    from fedsim.flower import worker

    return worker.initial_gradient(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the personal models of the clients that the message names."""
    from fedsim.flower import worker

    return worker.evaluate(message, context)
