"""`generate`: one request, one response."""

from closeup.generate_model import GenerateModel


class TritonPythonModel(GenerateModel):
    """The whole graph behind `/infer`, unary gRPC and `/generate`."""

    streaming = False
