package clients

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// RedisRaw is a RESP connection for exchanges that the caller composes.
type RedisRaw struct {
	*net.TCPConn
}

// DialRaw connects to the server at addr, without keepalives.
func DialRaw(d Dialer, addr string) (*RedisRaw, error) {
	c, err := dial(d, addr, KeepAlive{})
	if err != nil {
		return nil, err
	}
	return &RedisRaw{TCPConn: c}, nil
}

// SetGet stores a value of size bytes under key and reads it back; every byte
// of both replies is checked.
func (c *RedisRaw) SetGet(key string, size int, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	value := make([]byte, size)
	Fill(value, uint64(size), 0)
	if err := c.Exchange(resp("SET", key, string(value)), []byte("+OK\r\n")); err != nil {
		return fmt.Errorf("SET %s, %d bytes: %w", key, size, err)
	}
	if err := c.Exchange(resp("GET", key), bulk(string(value))); err != nil {
		return fmt.Errorf("GET %s, %d bytes: %w", key, size, err)
	}
	return nil
}

// Exchange writes a request and reads as many bytes as the reply must have.
func (c *RedisRaw) Exchange(request, want []byte) error {
	if _, err := c.Write(request); err != nil {
		return fault(err)
	}
	got := make([]byte, len(want))
	n, err := io.ReadFull(c.TCPConn, got)
	if !bytes.Equal(got[:n], want[:n]) {
		for i := range got[:n] {
			if got[i] != want[i] {
				return fmt.Errorf("wrong reply at byte %d of %d", i, len(want))
			}
		}
	}
	if err != nil {
		return fmt.Errorf("%w after %d of %d bytes of the reply", fault(err), n, len(want))
	}
	if err := idle(c.TCPConn); err != nil && !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}
