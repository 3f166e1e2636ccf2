package filter

// Reason says why a packet got its verdict, or what was done for a connection.
// Counters, logs, tests and ckptctl use the same words.
type Reason uint8

// Reasons.
const (
	ReasonNone Reason = iota
	// Packets that are not ours.
	NoApp
	Excluded
	Malformed
	BadOptions
	BadChecksum
	TruncatedCopy
	NotOurs
	SameNode
	Blocked
	// Running applications.
	Pass
	Translated
	HandshakePass
	ClosePass
	AskAnswer
	ICMPPass
	ICMPTranslated
	TableFull
	AppTableFull
	// Frozen.
	FrozenPass
	FrozenStripped
	FrozenKept
	FrozenCut
	FrozenUnordered
	FinHeldBack
	// Held remotes.
	HeldNoted
	HeldAnswered
	HeldChallenged
	HeldLimited
	HeldOutOfWindow
	HeldBadAck
	HeldOldTimestamp
	HeldNoAck
	HeldData
	HeldDataDropped
	HeldFin
	HeldFinAcked
	HeldRst
	HeldRstIgnored
	HeldSynKept
	HeldSynLimited
	HeldSynRefused
	HeldUnknown
	HeldICMP
	// Local sides that are away or on their way back.
	SealedFin
	SealedRst
	SealedAck
	SealedData
	SealedUnknown
	HandshakeAck
	HandshakeRefused
	NotOpenYet
	SynCaught
	HeldHeartbeat
	HeldHeartbeatLate
	HeldSpooled
	PortTaken
	HandedOver // another node has the structures
	SealedSilent
	RestoredKept // until RESTORED
	numReasons
)

// NumReasons is the number of reasons, for arrays of counters.
const NumReasons = int(numReasons)

var reasonNames = [...]string{
	"none", "no-app", "excluded", "malformed", "bad-options", "bad-checksum", "truncated-copy", "not-ours", "same-node", "blocked",
	"pass", "translated", "handshake", "close", "ask-answer", "icmp", "icmp-translated", "table-full", "app-table-full",
	"frozen-pass", "frozen-stripped", "frozen-kept", "frozen-cut", "frozen-unordered", "fin-held-back",
	"held-noted", "held-answered", "held-challenged", "held-limited", "held-out-of-window", "held-bad-ack",
	"held-old-timestamp", "held-no-ack", "held-data", "held-data-dropped", "held-fin", "held-fin-acked", "held-rst",
	"held-rst-ignored", "held-syn-kept", "held-syn-limited", "held-syn-refused", "held-unknown", "held-icmp",
	"sealed-fin", "sealed-rst", "sealed-ack", "sealed-data", "sealed-unknown", "handshake-ack",
	"handshake-refused", "not-open-yet", "syn-caught", "held-heartbeat", "held-heartbeat-late", "held-spooled", "port-taken",
	"handed-over", "sealed-silent", "restored-kept",
}

func (r Reason) String() string { return reasonNames[r] }
