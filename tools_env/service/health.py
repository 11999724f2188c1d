"""Queries a tool host's health check, with or without TLS: exit status 0 means that it answers calls.

python -m tools_env.service.health --address=127.0.0.1:8700 --tls_ca=ca.pem --tls_name=tools

For probes that run a command, because the kubelet's own gRPC probe has no TLS.
"""

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="health", description=__doc__.split("\n")[0])
    parser.add_argument("--address", required=True, help="host:port")
    parser.add_argument("--tls_ca", help="PEM file of the authority that signed the host's certificate")
    parser.add_argument("--tls_name", help="name in the certificate, if it differs from the address")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds")
    flags = parser.parse_args(argv)
    options = [("grpc.enable_http_proxy", 0)]
    if flags.tls_name:
        options.append(("grpc.ssl_target_name_override", flags.tls_name))
    try:
        if flags.tls_ca:
            credentials = grpc.ssl_channel_credentials(Path(flags.tls_ca).read_bytes())
            channel = grpc.secure_channel(flags.address, credentials, options)
        else:
            channel = grpc.insecure_channel(flags.address, options)
        with channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            reply = check(health_pb2.HealthCheckRequest(), timeout=flags.timeout)
    except OSError as error:
        print(f"health: cannot read {flags.tls_ca}: {error.strerror}; name a PEM file", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        print(f"health: {flags.address}: {error.code().name}", file=sys.stderr)
        return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
