package node

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/nfconnfilter/nfconnfilter/pkg/filter"
)

// collector reads the engine's counters when it is scraped.
type collector struct{ n *Node }

// Metrics is the filter's collector for Prometheus.
func (n *Node) Metrics() prometheus.Collector { return collector{n} }

var (
	descVerdicts = prometheus.NewDesc("nfconnfilter_verdicts_total", "Verdicts on queued packets by application and reason.", []string{"app", "reason"}, nil)
	descConns    = prometheus.NewDesc("nfconnfilter_connections", "Connection structures by application and state.", []string{"app", "state"}, nil)
	descState    = prometheus.NewDesc("nfconnfilter_app_state", "1 for the state that the application is in.", []string{"app", "state"}, nil)
	descKept     = prometheus.NewDesc("nfconnfilter_kept_bytes", "Payload kept for applications that are away.", []string{"app"}, nil)
	descUsed     = prometheus.NewDesc("nfconnfilter_limit_used", "How much of a limit is used; of one for each application, by that which has most.", []string{"limit"}, nil)
	descLimit    = prometheus.NewDesc("nfconnfilter_limit", "The limit.", []string{"limit"}, nil)
	descReceived = prometheus.NewDesc("nfconnfilter_queue_packets_total", "Packets received from the queue.", nil, nil)
	descOverruns = prometheus.NewDesc("nfconnfilter_queue_overruns_total", "Packets dropped because the queue's socket buffer was full.", nil, nil)
	descFull     = prometheus.NewDesc("nfconnfilter_queue_full_total", "Packets dropped because as many waited in the queue as it holds.", nil, nil)
	descRepaired = prometheus.NewDesc("nfconnfilter_rules_repaired_total", "Times that packet rules or sets changed by other programs were repaired.", []string{"what"}, nil)
	descGap      = prometheus.NewDesc("nfconnfilter_unfiltered_seconds", "For how long the queue was without a filter before this one; absent when that is not known.", nil, nil)
	descSent     = prometheus.NewDesc("nfconnfilter_injected_packets_total", "Packets sent by the filter itself.", []string{"result"}, nil)
)

func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descVerdicts, descConns, descState, descKept, descUsed, descLimit, descReceived, descOverruns, descFull, descRepaired, descGap, descSent} {
		ch <- d
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	counter := func(d *prometheus.Desc, v float64, l ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, l...)
	}
	gauge := func(d *prometheus.Desc, v float64, l ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, l...)
	}
	q, i := c.n.queue.Stats(), c.n.inj.Stats()
	counter(descReceived, float64(q.Received))
	counter(descOverruns, float64(q.Overruns))
	counter(descFull, float64(q.QueueFull))
	counter(descRepaired, float64(c.n.repairedRules.Load()), "rules")
	counter(descRepaired, float64(c.n.repairedSets.Load()), "sets")
	if g := c.n.gap.Load(); g != nil && g.Known {
		gauge(descGap, g.Time.Seconds())
	}
	counter(descSent, float64(i.Sent), "sent")
	counter(descSent, float64(i.Failed), "failed")
	x, err := c.n.do(ctx, &filter.Status{})
	if err != nil {
		return
	}
	for _, a := range x.(*filter.StatusList).Apps {
		for r, v := range a.Reasons {
			counter(descVerdicts, float64(v), a.Name, r)
		}
		for s, v := range a.Connections {
			gauge(descConns, float64(v), a.Name, s)
		}
		gauge(descState, 1, a.Name, a.State.String())
		gauge(descKept, float64(a.Kept), a.Name)
	}
	for _, l := range x.(*filter.StatusList).Limits {
		gauge(descUsed, float64(l.Used), l.Name)
		gauge(descLimit, float64(l.Max), l.Name)
	}
}
