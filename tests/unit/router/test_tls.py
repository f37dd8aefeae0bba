"""Both ports behind TLS: who is let in with which certificate, and files that do not fit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvcluster.admin_client import AdminClient
from kvcluster.client import Client
from kvcluster.client_tls import ClientTls
from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.config_access import TlsConfig
from kvcluster.errors import ConfigError, CredentialInvalid, ServerUnavailable
from kvcluster.router.front_door import FrontDoor
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from tests.certificates import Authority, Pair
from tests.unit.router.administering import INFERENCE, bootstrap
from tests.unit.router.fake_backend import FakeBackend
from tests.unit.router.serving import text_of

TIMEOUT_S = 5.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server_pair(authority: Authority) -> Pair:
    return authority.issue("server")


@asynccontextmanager
async def served(
    folder: Path, pair: Pair, *, listen: str = "127.0.0.1:0", **files: Path
) -> AsyncIterator[tuple[FrontDoor, str]]:
    """A router behind TLS and an operator's secret."""
    database = folder / "tenants.sqlite"
    secret = bootstrap(database)
    door = FrontDoor(
        [FakeBackend()],
        RouterConfig(listen=listen),
        TenancyConfig(database=str(database), admin_listen=listen),
        tls=TlsConfig(
            certificate=str(pair.certificate),
            key=str(pair.key),
            **{name: str(file) for name, file in files.items()},
        ),
    )
    try:
        await door.start()
        yield door, secret
    finally:
        await door.stop(grace_s=0)


def local(address: str) -> str:
    return f"127.0.0.1:{address.rpartition(':')[2]}"


async def red_key(door: FrontDoor, secret: str, tls: ClientTls) -> str:
    """The secret of a key of tenant red, which is made over TLS."""
    async with AdminClient(local(door.admin_address), api_key=secret, tls=tls) as admin:
        await admin.ask(pb.CreateTenantRequest(tenant_id="red"), timeout_s=TIMEOUT_S)
        made = await admin.ask(
            pb.CreateApiKeyRequest(parent="tenants/red", api_key=pb.ApiKey(role=INFERENCE))
        )
    assert isinstance(made, pb.CreateApiKeyResponse)
    return made.secret


async def models_seen(address: str, tls: ClientTls | None, key: str | None = None) -> int:
    async with Client(address, api_key=key, tls=tls) as client, asyncio.timeout(TIMEOUT_S):
        return len(await client.models())


async def test_both_ports_serve_whoever_trusts_the_authority_on_every_address(
    tmp_path: Path, authority: Authority, server_pair: Pair
) -> None:
    tls = ClientTls(ca=authority.file)
    async with served(tmp_path, server_pair, listen="0.0.0.0:0") as (door, secret):
        key = await red_key(door, secret, tls)
        async with Client(local(door.address), api_key=key, tls=tls) as client:
            events = [e async for e in client.generate(prompt="hello", max_output_tokens=5)]

    assert text_of(events) == "hello"


async def test_a_client_without_tls_or_with_another_authority_gets_nothing(
    tmp_path: Path, server_pair: Pair
) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with served(tmp_path, server_pair) as (door, secret):
        for tls in (None, ClientTls(ca=stranger.file), ClientTls()):
            with pytest.raises(ServerUnavailable):
                await models_seen(door.address, tls, secret)


async def test_a_certificate_of_another_name_is_refused_unless_that_name_is_expected(
    tmp_path: Path, authority: Authority, server_pair: Pair
) -> None:
    async with served(tmp_path, server_pair) as (door, _):
        wrong = ClientTls(ca=authority.file, server_name="elsewhere.example")
        with pytest.raises(ServerUnavailable):
            await models_seen(door.address, wrong)
        right = ClientTls(ca=authority.file, server_name="localhost")
        with pytest.raises(CredentialInvalid):
            await models_seen(door.address, right)


async def test_where_client_certificates_are_wanted_a_key_alone_does_not_do_nor_they_alone(
    tmp_path: Path, authority: Authority, server_pair: Pair
) -> None:
    clients = Authority(tmp_path, "clients")
    good, forged = clients.issue("alice"), Authority(tmp_path, "others").issue("mallory")
    bare = ClientTls(ca=authority.file)
    ours = ClientTls(ca=authority.file, certificate=good.certificate, key=good.key)
    theirs = ClientTls(ca=authority.file, certificate=forged.certificate, key=forged.key)
    async with served(tmp_path, server_pair, client_ca=clients.file) as (door, secret):
        key = await red_key(door, secret, bare)  # the admin port asks for no certificate here
        for tls in (bare, theirs):
            with pytest.raises(ServerUnavailable):
                await models_seen(door.address, tls, key)
        with pytest.raises(CredentialInvalid):
            await models_seen(door.address, ours)
        assert await models_seen(door.address, ours, key) == 1


async def test_the_admin_port_has_an_authority_of_its_own(
    tmp_path: Path, authority: Authority, server_pair: Pair
) -> None:
    admins = Authority(tmp_path, "admins")
    good = admins.issue("root")
    bare = ClientTls(ca=authority.file)
    ours = ClientTls(ca=authority.file, certificate=good.certificate, key=good.key)
    async with served(tmp_path, server_pair, admin_client_ca=admins.file) as (door, secret):
        with pytest.raises(ServerUnavailable):
            await red_key(door, secret, bare)
        key = await red_key(door, secret, ours)
        assert await models_seen(door.address, bare, key) == 1


async def test_replaced_certificates_are_used_for_the_next_connection_and_bad_ones_are_not(
    tmp_path: Path, authority: Authority, server_pair: Pair
) -> None:
    later = Authority(tmp_path, "later")
    new_pair = later.issue("server2")
    async with served(tmp_path, server_pair) as (door, _):
        server_pair.certificate.write_bytes(new_pair.certificate.read_bytes())
        with pytest.raises(
            CredentialInvalid
        ):  # the key is still the old one's: the old pair goes on
            await models_seen(door.address, ClientTls(ca=authority.file))
        server_pair.key.write_bytes(new_pair.key.read_bytes())
        with pytest.raises(CredentialInvalid):
            await models_seen(door.address, ClientTls(ca=later.file))


def _missing(pair: Pair, folder: Path) -> Pair:
    return Pair(folder / "none.crt", pair.key)


def _no_pem(pair: Pair, folder: Path) -> Pair:
    pair.certificate.write_text("no certificate")
    return pair


def _swapped(pair: Pair, folder: Path) -> Pair:
    return Pair(pair.certificate, Authority(folder, "other").issue("other").key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, r"tls\.certificate: .*none\.crt cannot be read"),
        (_no_pem, r"tls\.certificate: .* has no certificate"),
        (_swapped, r"tls\.key: .* not that of"),
    ],
)
async def test_files_that_do_not_fit_keep_the_server_from_starting(
    spoil: object, message: str, tmp_path: Path, server_pair: Pair
) -> None:
    pair = spoil(server_pair, tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        async with served(tmp_path, pair):
            pass


async def test_an_authority_that_cannot_be_read_is_named_by_its_setting(
    tmp_path: Path, server_pair: Pair
) -> None:
    with pytest.raises(ConfigError, match=r"tls\.admin_client_ca: .* cannot be read"):
        async with served(tmp_path, server_pair, admin_client_ca=tmp_path / "none.pem"):
            pass


def test_a_client_is_told_at_once_which_of_its_files_is_wrong(
    tmp_path: Path, authority: Authority, server_pair: Pair
) -> None:
    other = authority.issue("other")
    for tls, message in (
        (ClientTls(ca=tmp_path / "none.pem"), "cannot be read"),
        (ClientTls(ca=server_pair.key), "no certificate"),
        (ClientTls(certificate=server_pair.certificate), "together"),
        (ClientTls(certificate=server_pair.certificate, key=other.key), "not that of"),
    ):
        with pytest.raises(ConfigError, match=message):
            Client("localhost:1", tls=tls)


async def test_tls_alone_is_no_authentication(tmp_path: Path, server_pair: Pair) -> None:
    tls = TlsConfig(certificate=str(server_pair.certificate), key=str(server_pair.key))
    door = FrontDoor([FakeBackend()], RouterConfig(listen="127.0.0.1:0"), TenancyConfig(), tls=tls)

    with pytest.raises(ConfigError, match="no authentication"):
        await door.start()


async def test_without_authentication_no_port_is_open_to_others_with_tls_either(
    tmp_path: Path, server_pair: Pair
) -> None:
    tls = TlsConfig(certificate=str(server_pair.certificate), key=str(server_pair.key))
    tenancy = TenancyConfig(database=str(tmp_path / "t.sqlite"), admin_listen="0.0.0.0:0")
    router = RouterConfig(listen="127.0.0.1:0", insecure_local=True)
    door = FrontDoor([FakeBackend()], router, tenancy, tls=tls)

    with pytest.raises(ConfigError, match=r"tenancy\.admin_listen: want a loopback"):
        await door.start()
    with pytest.raises(ConfigError, match=r"router\.listen: want a loopback"):
        RouterConfig(listen="0.0.0.0:0", insecure_local=True)
    await door.stop(grace_s=0)
