"""Facts about who is served: TLS, client certificates, several tokens, and hosts that strangers could reach."""

import asyncio
import datetime
import re
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tools_env.client import ToolInfraError, ToolsClient
from tools_env.errors import ToolHostError
from tools_env.service import health
from tools_env.service.auth import check_exposure
from tools_env.service.settings import HostSettings


def certificates(folder):
    """Writes ca.pem, and server and client pairs that it signed."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)

    def make(name, issuer=None, issuer_key=None):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(issuer_key or key, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return subject, key

    authority, authority_key = make("ca")
    make("server", authority, authority_key)
    make("client", authority, authority_key)
    make("other_ca")
    return {name: str(folder / name) for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")}


def test_mutual_tls_serves_only_clients_with_a_certificate(running, tmp_path):
    pem = certificates(tmp_path)

    async def main():
        tls = dict(tls_cert=pem["server.pem"], tls_key=pem["server.key"], tls_client_ca=pem["ca.pem"])
        async with running(**tls) as it:
            address = it.address.replace("127.0.0.1", "localhost")
            known = ToolsClient(address, tls_ca=pem["ca.pem"], tls_cert=pem["client.pem"], tls_key=pem["client.key"])
            session = await known.open_session("e")
            assert (await session.call("todo", {}, call_id="0")).outcome == "ok"
            stranger = ToolsClient(address, tls_ca=pem["ca.pem"], call_timeout=0.5)
            plain = ToolsClient(address, call_timeout=0.5)
            for client in (stranger, plain):
                with pytest.raises(ToolInfraError, match="UNAVAILABLE|DEADLINE_EXCEEDED"):
                    await client.open_session("e")
            for client in (known, stranger, plain):
                await client.close()

    asyncio.run(main())


def test_client_refuses_a_host_whose_authority_it_does_not_know(running, tmp_path):
    pem = certificates(tmp_path)

    async def main():
        async with running(tls_cert=pem["server.pem"], tls_key=pem["server.key"]) as it:
            address = it.address.replace("127.0.0.1", "localhost")
            client = ToolsClient(address, tls_ca=str(tmp_path / "other_ca.pem"), call_timeout=0.5)
            with pytest.raises(ToolInfraError):
                await client.list_tools()
            await client.close()

    asyncio.run(main())


def test_two_tokens_are_good_while_one_replaces_the_other(running):
    async def main():
        async with running(token="old,new", client_token="old") as it:
            for token, served in (("old", True), ("new", True), ("old,new", False), ("", False)):
                client = ToolsClient(it.address, token=token)
                try:
                    await client.list_tools()
                    assert served
                except ToolInfraError as error:
                    assert not served and error.status == "UNAUTHENTICATED"
                await client.close()

    asyncio.run(main())


def test_reflection_needs_the_token_too(running):
    async def main():
        async with running(token="secret", client_token="secret") as it:
            async with grpc.aio.insecure_channel(it.address) as channel:
                info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    async for _ in info(iter([reflection_pb2.ServerReflectionRequest(list_services="")])):
                        pass
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "tools.example"])
def test_host_that_strangers_could_reach_does_not_start(host):
    with pytest.raises(ToolHostError, match="callers would not be authenticated; set .STEPDR_TOOLS_TOKEN"):
        check_exposure(host, None, None, False)
    check_exposure(host, "secret", None, False)
    check_exposure(host, None, "ca.pem", False)
    check_exposure(host, None, None, True)
    check_exposure("127.0.0.1", None, None, False)


def test_half_a_certificate_and_an_empty_token_are_named(running, tmp_path):
    with pytest.raises(ToolHostError, match="tls_cert and tls_key need each other"):
        HostSettings(offline_web="w", tls_cert="c.pem")

    async def main(**settings):
        async with running(**settings):
            pass

    with pytest.raises(ToolHostError, match="cannot read .*none.pem: No such file"):
        asyncio.run(main(tls_cert=str(tmp_path / "none.pem"), tls_key=str(tmp_path / "none.pem")))
    with pytest.raises(ToolHostError, match="the bearer token is empty"):
        asyncio.run(main(token=" , "))


def test_the_example_of_the_documentation_runs_as_written(running, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).resolve().parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    example = next(block for block in blocks if "ToolsClient(" in block)
    assert len(example.strip().splitlines()) <= 21
    pem = certificates(tmp_path)
    monkeypatch.chdir(tmp_path)

    async def main():
        tls = dict(tls_cert=pem["server.pem"], tls_key=pem["server.key"], token="secret")
        async with running(**tls) as it:
            address = it.address.replace("127.0.0.1", "localhost")
            assert "127.0.0.1:8700" in example
            program = example.replace("127.0.0.1:8700", address)
            await asyncio.to_thread(exec, compile(program, "docs/tools.md", "exec"), {"__name__": "example"})
            probe = [f"--address={it.address}", f"--tls_ca={pem['ca.pem']}"]
            assert await asyncio.to_thread(health.main, [*probe, "--tls_name=localhost"]) == 0
            assert (
                await asyncio.to_thread(health.main, [*probe, "--timeout=0.5"]) == 1
            )  # another name than the certificate's

    asyncio.run(main())
    said = capsys.readouterr().out
    assert said.startswith("ok ") and "Vienna" in said and "'tool_calls': 19" in said
