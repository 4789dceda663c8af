"""The settings of gRPC connections that both ends agree on."""

from __future__ import annotations

from edgert.hosts.certificates import SERVER_NAME
from edgert.hosts.service.limits import MOST_MESSAGE_BYTES, ServiceLimits

_BEAT_MS, _SILENCE_MS = 10_000, 5_000  # heartbeats: PING frames of HTTP/2
_MOST_METADATA_BYTES = 16 << 10

Options = list[tuple[str, int | str]]

_BOTH: Options = [
    ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MOST_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MOST_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MOST_METADATA_BYTES),
    ("grpc.keepalive_time_ms", _BEAT_MS),
    ("grpc.keepalive_timeout_ms", _SILENCE_MS),
    ("grpc.http2.max_pings_without_data", 0),  # any number
    ("grpc.http2.min_time_between_pings_ms", _BEAT_MS // 2),
]


def server_options(limits: ServiceLimits, most_calls: int) -> Options:
    """Return the settings of who listens."""
    return [
        *_BOTH,
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", most_calls),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", _BEAT_MS // 2),
    ]


def client_options(limits: ServiceLimits) -> Options:
    """Return the settings of who connects."""
    return [
        *_BOTH,
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.min_reconnect_backoff_ms", int(limits.handshake_s * 1000)),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
