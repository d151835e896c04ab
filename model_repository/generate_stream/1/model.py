"""`generate_stream`: the same graph, with progress events before the final response."""

from closeup.generate_model import GenerateModel


class TritonPythonModel(GenerateModel):
    """The whole graph behind gRPC streams and `/generate_stream`."""

    streaming = True
