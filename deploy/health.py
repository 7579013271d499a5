"""Whether a server is ready, by its gRPC health service: exit code 0 when it is, 1 when not. Prints what it heard."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 5.0


def main(argv: list[str]) -> int:
    """`health.py ADDRESS [SERVICE]`; without a service, the server as a whole."""
    if len(argv) not in (1, 2):
        print("usage: health.py ADDRESS [SERVICE]", file=sys.stderr)
        return 2
    with grpc.insecure_channel(argv[0]) as channel:
        request = health_pb2.HealthCheckRequest(service="".join(argv[1:]))
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            print(f"{argv[0]}: {error.code().name}: {error.details()}")
            return 1
    print(f"{argv[0]}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
